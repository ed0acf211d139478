"""BERT and GPT written by hand in PyTorch. Start reading at transformer.py."""

from mini.bert import Bert as Bert
from mini.config import ModelConfig as ModelConfig
from mini.gpt import GPT as GPT
from mini.runs import load_run as load_run
