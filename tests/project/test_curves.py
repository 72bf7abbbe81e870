"""Training curves: what is run, what is compared, the table and the chart."""

import pytest

from benchmarks import curves
from resnet_fast.program import options


def write(out, accuracy):
    """A run of two epochs of each arithmetic and of seeds 0 and 1; accuracy: the last, by variant."""
    for variant in curves.VARIANTS:
        for seed in (0, 1):
            folder = out / f"{variant.replace(', ', '-')}-{seed}"
            folder.mkdir(parents=True)
            last = accuracy[variant] + 0.01 * seed
            rows = f"epoch,train_loss,test_accuracy\n1,2.0,0.1\n2,{0.5 + seed},{last}\n"
            (folder / "log.csv").write_text(rows)


def test_table_and_chart(tmp_path):
    write(tmp_path, {"fused, bfloat16": 0.97, "eager, float32": 0.9})
    found = curves.curves(tmp_path, [0, 1])
    assert [(c.variant, c.seed) for c in found] == [(v, s) for s in (0, 1) for v in curves.VARIANTS]
    assert curves.table(found).splitlines()[2:] == [
        "| fused, bfloat16 | 97.50% | 97.0 - 98.0 | 1.0000 |",
        "| eager, float32 | 90.50% | 90.0 - 91.0 | 1.0000 |",
    ]
    for name in ("a.svg", "b.svg"):
        curves.chart(found, "digits", tmp_path / name)
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes()
    assert drawn.count(b"fused, bfloat16") == 1  # one entry of the legend for all seeds


def test_what_cannot_be_compared(tmp_path):
    write(tmp_path, dict.fromkeys(curves.VARIANTS, 0.9))
    with pytest.raises(ValueError, match=r"no run of fused, bfloat16 with seed 2: .*log.csv is missing"):
        curves.curves(tmp_path, [0, 1, 2])
    log = tmp_path / "eager-float32-1" / "log.csv"
    log.write_text("".join(log.read_text().splitlines(True)[:2]))
    with pytest.raises(ValueError, match=r"runs of \[1, 2\] epochs"):
        curves.curves(tmp_path, [0, 1])


def test_the_program_is_run_for_each_seed(tmp_path, monkeypatch, capsys):
    """With options that it takes, which differ in nothing but the arithmetic; main draws what they left."""
    ran = []
    monkeypatch.setattr(curves.subprocess, "run", lambda command, check: ran.append(command))
    monkeypatch.setattr("sys.argv", ["curves", "--seeds", "0", "1", "--out", str(tmp_path)])
    write(tmp_path, dict.fromkeys(curves.VARIANTS, 0.9))
    curves.main()
    assert [command[1:3] for command in ran] == [["-m", "resnet_fast.train"]] * 4
    given = [options.parse(command[3:]) for command in ran]
    assert [(o.seed, o.backend, o.amp) for o in given] == [
        (0, "auto", "bf16"),
        (0, "eager", "off"),
        (1, "auto", "bf16"),
        (1, "eager", "off"),
    ]
    assert {(o.model, o.epochs, str(o.data)) for o in given} == {("cifar_resnet32", 6, "mnist5k")}
    assert len({o.out for o in given}) == 4
    assert (tmp_path / "curves.svg").exists()
    assert (tmp_path / "curves.md").read_text() in capsys.readouterr().out
