import json
import struct

import pytest
import torch

from mini.errors import UserError
from mini.tensors import load_tensors, save_tensors


def test_every_dtype_survives(tmp_path):
    torch.manual_seed(0)
    tensors = {
        str(dtype): (torch.randn(3, 5) * 9).to(dtype)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "transposed": torch.randn(4, 3).t()}
    save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_same_tensors_same_bytes(tmp_path):
    save_tensors(tmp_path / "a", {"x": torch.ones(3), "y": torch.zeros(2)})
    save_tensors(tmp_path / "b", {"y": torch.zeros(2), "x": torch.ones(3)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_writing_to_a_loaded_tensor_leaves_the_file(tmp_path):
    save_tensors(tmp_path / "a", {"x": torch.ones(3)})
    load_tensors(tmp_path / "a")["x"].zero_()
    assert load_tensors(tmp_path / "a")["x"].tolist() == [1, 1, 1]


def make(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<Q", 2**60) + b"{}",
        make({"x": ONE}, bytes(8))[:12],  # cut off inside the header
        make({"x": ONE}, bytes(7)),  # cut off inside the data
        make({"x": ONE}, bytes(9)),  # bytes of no tensor
        make(b"{not json}"),
        make(b"[1, 2]"),
        make({"x": {**ONE, "dtype": "F33"}}, bytes(8)),
        make({"x": {**ONE, "shape": [3]}}, bytes(8)),
        make({"x": {**ONE, "shape": [-2]}}, bytes(8)),
        make({"x": {**ONE, "data_offsets": [8, 0]}}, bytes(8)),
        make({"x": ONE, "y": ONE}, bytes(8)),  # two tensors in one place
        make({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    ],
)
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        load_tensors(path)
