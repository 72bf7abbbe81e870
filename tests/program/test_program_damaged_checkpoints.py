"""Damaged and foreign checkpoints: one line in the program's own words, or a load that is good."""

import copy
import io
import os
import pickle

import numpy as np
import pytest
import torch
from helpers.program.support import differences, evaluated, small_cifar
from test_program_checkpoints import state

from resnet_fast import models, predict, reference
from resnet_fast.program import checkpoints, data, distributed, loop
from resnet_fast.program.options import ProgramError, parse


class Caller:
    def __reduce__(self):
        return print, ("called",)


def saved(path, content, **how):
    torch.save(content, path, **how)
    return path.read_bytes()


def foreign(folder):
    """Contents of files that are not checkpoints of the program, by the words that refuse them."""
    whole = checkpoints.save(folder, state(1), keep=1, best=False).read_bytes()
    path = folder / "content"
    flipped = bytearray(whole)
    flipped[whole.index(torch.full((10,), 1.0).numpy().tobytes())] ^= 1
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), script)
    return [
        (b"", "is empty"),
        (b"PK", "is damaged, or not a file of torch.save"),
        (pickle.dumps(3), "is damaged, or not a file of torch.save"),
        (whole[: len(whole) // 2], "is truncated or damaged"),
        (whole[:-1], "is truncated or damaged"),
        (bytes(flipped), "is damaged: the checksum of its part"),
        (saved(path, {"format": checkpoints.FORMAT, "model": Caller()}), "holds more than tensors and plain values"),
        (saved(path, torch.nn.Linear(1, 1)), "holds more than tensors and plain values"),
        (script.getvalue(), "is damaged, or not a file of torch.save"),
        (saved(path, reference.cifar_resnet20().state_dict()), "has format None, want 1"),
        (saved(path, {"x": torch.ones(2)}, _use_new_zipfile_serialization=False), "has format None, want 1"),
        (saved(path, {"format": 99}), "has format 99, want 1"),
        (saved(path, {"format": torch.ones(3)}), "has format of type Tensor, want 1"),
        (saved(path, [1]), "has format None, want 1"),
        (saved(path, {"format": 1}), "is not whole: it lacks step, epoch, done, model"),
        (saved(path, {"format": 1, **state(1), "model": [1]}), "is not whole: it lacks model"),
        (saved(path, {"format": 1, **state(1), "history": [{"step": 1}]}), "is not whole: its history"),
    ]


def test_what_is_no_checkpoint_is_refused(tmp_path, capfd, recwarn):
    contents = foreign(tmp_path)
    recwarn.clear()
    for content, words in contents:
        (tmp_path / "bad.pt").write_bytes(content)
        for load in (checkpoints.load, predict.load):
            with pytest.raises(ProgramError) as caught:
                load(tmp_path / "bad.pt")
            assert f"bad.pt {words}" in str(caught.value)
            assert "\n" not in str(caught.value)
            assert "weights_only" not in str(caught.value)
    for path, reason in ((tmp_path / "none.pt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ProgramError, match=f"cannot be read: {reason}"):
            checkpoints.load(path)
    assert "called" not in capfd.readouterr().out
    assert not recwarn.list


def mutated(content, dice):
    """``content`` with a few bytes changed, cut out, doubled or moved, or without its end."""
    content = bytearray(content)
    for _ in range(dice.integers(1, 4)):
        kind, place = dice.integers(6), int(dice.integers(len(content)))
        length = int(dice.integers(1, 1 + min(64, len(content) - place)))
        part = content[place : place + length]
        if kind == 0:
            content[place] ^= 1 << int(dice.integers(8))
        elif kind == 1:
            content[place : place + length] = dice.bytes(length)
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = part
        elif kind == 4:
            content[place : place + length] = bytes(length)
        elif place:
            del content[place:]
    return bytes(content)


def result(load, path):
    """What ``load(path)`` returns, or the line that refuses it."""
    try:
        return load(path)
    except ProgramError as error:
        return str(error)


def test_mutated_bytes(tmp_path):
    """The same state, bit for bit, or ProgramError: never another exception, never another weight."""
    path = checkpoints.save(tmp_path, state(7), keep=1, best=False)
    content, wanted = path.read_bytes(), checkpoints.load(path)
    dice, refused = np.random.default_rng(0), 0
    for number in range(600):
        path.write_bytes(mutated(content, dice))
        found = result(checkpoints.load, path)
        refused += isinstance(found, str)
        assert "\n" not in found if isinstance(found, str) else differences(found, wanted) == [], number
    assert 400 < refused < 600


VALUES = (None, -1, 2**70, float("nan"), "x", b"", [], {}, [None], {"x": 1}, torch.zeros(0), torch.ones(3))


def changed(state, dice):
    """``state`` with one entry, at any depth, gone or replaced."""
    state = copy.deepcopy(state)
    place = state
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = keys[int(dice.integers(len(keys)))]
        inner = place[key]
        if not (isinstance(inner, (dict, list)) and inner and dice.random() < 0.7):
            break
        place = inner
    if dice.random() < 0.3:
        del place[key]
    else:
        place[key] = VALUES[int(dice.integers(len(VALUES)))]
    return state


def test_changed_values(tmp_path, monkeypatch, one_thread):
    """Whole files whose values are not what they were: the trainer and the prediction take them, or ProgramError."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes most of the time
    monkeypatch.setattr(models, "cifar_resnet20", lambda num_classes: models.CifarResNet(1, num_classes))
    options = parse([*small_cifar(tmp_path, count=16), "--out", str(tmp_path / "run"), "--epochs", "1", "--ema", "0.9"])
    trainer = loop.Trainer(options, data.load(options), distributed.Processes(options))
    trainer._end_epoch(evaluated(1.0, right=1))
    (path,) = (tmp_path / "run").glob("step-*")
    whole, dice, refused = checkpoints.load(path), np.random.default_rng(0), [0, 0]
    for _ in range(40):
        path.write_bytes(checkpoints.pack(changed(whole, dice)))
        for number, load in enumerate((trainer.restore, predict.load)):
            found = result(load, path)
            refused[number] += isinstance(found, str)
            assert not isinstance(found, str) or "\n" not in found
    assert min(refused) > 10
    path.write_bytes(checkpoints.pack(whole))
    trainer.restore(path)
    assert differences(trainer.state()["model"], whole["model"]) == []
