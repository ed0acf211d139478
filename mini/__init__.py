"""BERT and GPT written by hand in PyTorch. Start reading at model/transformer.py."""

from mini.model.bert import Bert as Bert
from mini.model.config import ModelConfig as ModelConfig
from mini.model.gpt import GPT as GPT
from mini.training.runs import load_run as load_run
