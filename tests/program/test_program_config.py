"""A configuration file is equal to the command line."""

import pytest
import yaml
from helpers.program.support import checkpoint, differences, eight_layers, run, small_cifar

from resnet_fast.program.options import Options, ProgramError, parse


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_equal_to_the_command_line(file):
    """Also where YAML's own types are not the command line's: off, 1e-3, no."""
    text = "data: photos\nlr: 1e-3\namp: off\ncompile: true\nsync-bn: no\nweight_decay: null\nema:\nbatch: 0x10\n"
    with pytest.raises(ProgramError, match="argument --batch: invalid int value: '0x10'"):
        parse(["--config", file(text)])
    path = file(text.replace("0x10", "16"))
    line = ["--data", "photos", "--lr", "1e-3", "--amp", "off", "--compile", "--no-sync-bn", "--batch", "16"]
    assert parse(["--config", path]) == parse([*line, "--config", path])
    given = parse(["--config", path])
    assert (given.lr, given.amp, given.compile, given.sync_bn) == (1e-3, "off", True, False)
    assert (given.weight_decay, given.ema, given.batch) == (None, 0.0, 16)


def test_the_command_line_goes_before(file):
    path = file("data: photos\ncompile: true\nlr: 0.1\nbatch: 4\n")
    given = parse(["--lr", "0.2", "--config", path, "--no-compile", "--data", "others"])
    assert (given.lr, given.compile, given.data, given.batch) == (0.2, False, "others", 4)


def test_saved_options_are_read_again(file):
    line = ["--data", "Bilder ü/日本", "--seed", "7", "--mixup", "0.2", "--compile", "--no-channels-last", "--resume"]
    given = parse([*line, "--checksum", "012", "--lr", "1e-5"])
    path = file(given.as_yaml())
    again = parse(["--config", path, "--resume"])
    assert again == Options(**{**vars(given), "config": path})
    one_call = {"config", "resume", "evaluate"}
    assert yaml.safe_load(given.as_yaml()).keys() == vars(given).keys() - one_call


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: much", r"run.yaml: argument --lr: invalid float value: 'much'"),
        ("model: resnet1", r"run.yaml: argument --model: invalid choice: 'resnet1'"),
        ("leraning-rate: 1", "run.yaml has the unknown option leraning-rate: want those of --help"),
        ("config: other.yaml", "run.yaml has the unknown option config"),
        ("lr: [1, 2]", r"run.yaml: lr is \['1', '2'\], want one value"),
        ("lr: {a: 1}", "run.yaml: lr is .*, want one value"),
        ("compile: perhaps", "run.yaml: compile is perhaps, want true or false"),
        ("- lr", "run.yaml holds no options"),
        ("", "run.yaml holds no options"),
        ("a: b: c", "run.yaml cannot be read: mapping values are not allowed"),
        ("!!python/object/apply:os.getcwd []", "run.yaml"),
        ("lr: -1", "--lr is -1.0, want a number from 0"),
    ],
)
def test_errors_are_one_line(text, message, file):
    with pytest.raises(ProgramError, match=message) as caught:
        parse(["--data", "x", "--config", file(text)])
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00lr")
    for name in ("bytes", "none", ""):
        with pytest.raises(ProgramError, match="cannot be read"):
            parse(["--data", "x", "--config", str(tmp_path / name)])
    with pytest.raises(ProgramError, match="the following arguments are required: --data"):
        parse(["--lr", "1"])


def test_a_run_from_its_own_file(tmp_path, monkeypatch, capfd):
    eight_layers(monkeypatch)
    given = [*small_cifar(tmp_path, count=16), "--epochs", "1", "--lr", "0.01", "--seed", "3"]
    assert run(*given, "--out", tmp_path / "a") == 0
    assert run("--config", tmp_path / "a/config.yaml", "--out", tmp_path / "b") == 0
    name = "step-00000002.pt"
    assert differences(checkpoint(tmp_path / "a" / name), checkpoint(tmp_path / "b" / name)) == []
    assert yaml.safe_load((tmp_path / "b/config.yaml").read_text())["out"] == str(tmp_path / "b")
    assert run("--config", tmp_path / "b/config.yaml", "--resume") == 0
    assert "goes on from" in capfd.readouterr().out
    saved = (tmp_path / "b/config.yaml").read_text()
    assert run("--config", tmp_path / "b/config.yaml", "--resume", "--lr", "0.5") == 2
    assert (tmp_path / "b/config.yaml").read_text() == saved


def test_message_of_the_program(capfd):
    assert run("--config", "/none.yaml") == 2
    assert capfd.readouterr().err == (
        "resnet_fast.train: --config /none.yaml cannot be read: [Errno 2] No such file or directory: '/none.yaml'\n"
    )
