"""A pickle is read for its arrays and never obeyed."""

import collections
import io
import os
import pickle

import numpy as np
import pytest
from support.archives import cifar_batch, pictures

from mmf_fast.data.formats.pickles import load_dict
from mmf_fast.data.formats.sources import DataError


class Call:
    """Pickles to a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def load(content):
    return load_dict(io.BytesIO(content), "batch")


def test_a_batch_of_python_2_is_what_the_standard_library_makes_of_it():
    content = cifar_batch(pictures(3), [9, 0, 4])
    expected = pickle.loads(content, encoding="bytes")
    found = load(content)
    assert np.array_equal(found["data"], expected[b"data"]) and found["data"].dtype == np.uint8
    assert np.array_equal(found["data"].reshape(3, 3, 32, 32), pictures(3))
    assert found["labels"] == expected[b"labels"] == [9, 0, 4]
    assert found["filenames"] == expected[b"filenames"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "<f4", "?"])
def test_arrays_of_every_protocol(protocol, dtype):
    array = (np.arange(24).reshape(2, 3, 4) * 11 % 256).astype(dtype)
    table = {"data": array, "fortran": np.asfortranarray(array), "labels": [np.int64(3), 4], "empty": array[:0]}
    found = load(pickle.dumps(table, protocol))
    assert np.array_equal(found["data"], array) and found["data"].dtype == array.dtype
    assert np.array_equal(found["fortran"], array)
    assert found["labels"] == [3, 4]
    assert found["empty"].shape == (0, 3, 4)


def harmful():
    """(pickled value, word of the error); each would write the file `trace` into the working folder."""
    return [
        (Call(os.system, "touch trace"), "system"),
        (Call(eval, "open('trace', 'w')"), "eval"),
        (Call(exec, "open('trace', 'w')"), "exec"),
        (Call(getattr, "text", "upper"), "getattr"),
        (np.array([Call(os.system, "touch trace")], object), "only numbers"),
        (np.zeros(2, [("a", "i4")]), "only numbers"),
        (np.load, "load"),
        (collections.OrderedDict(), "OrderedDict"),
    ]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(("value", "word"), harmful(), ids=[word for _, word in harmful()])
def test_code_is_refused(value, word, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=word) as error:
        load(pickle.dumps({"data": value}, protocol))
    assert str(error.value).startswith("batch: ") and "\n" not in str(error.value)
    assert os.listdir() == []


def test_the_trap_would_snap(tmp_path, monkeypatch):
    """The standard library obeys the same pickle."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps({"data": Call(os.system, "touch trace")}))
    assert os.listdir() == ["trace"]


def test_a_shape_larger_than_its_bytes_is_refused():
    content = pickle.dumps({"data": np.zeros(4, np.uint8)}, 2)
    crafted = content.replace(b"K\x04\x85", b"M\xff\xff\x85")
    assert crafted != content
    with pytest.raises(DataError, match="damaged"):
        load(crafted)


def test_every_truncation_is_an_error():
    content = cifar_batch(pictures(1, side=4), [3])
    for length in range(len(content)):
        with pytest.raises(DataError):
            load(content[:length])


def test_flipped_bits_never_raise_anything_else():
    content = bytearray(cifar_batch(pictures(1, side=4), [3]))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        try:
            load(bytes(damaged))
        except DataError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("value", [[1, 2], "text", None, np.zeros(3)])
def test_something_else_than_a_dict(value):
    with pytest.raises(DataError, match="not a dict"):
        load(pickle.dumps(value))
