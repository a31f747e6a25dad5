"""timm's readers: a checkpoint scores alike through each, none loses an image in silence, and runs go on.

Everything is on disk, and nothing reaches a network.
"""

import csv
import io
import json
import os
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import webdataset
from PIL import Image
from script_runs import run_two_processes
from test_resume import assert_same_runs

from ditac_timm.training.loop import LossMeter

SMALL = shlex.split("--model test_resnet -b 12 -j 0 --img-size 32 --num-classes 10 --warmup-epochs 0 --lr 0.01")
TRAIN, VALIDATION = 120, 50  # images of the digits
SHARDS = {"train": 4, "validation": 3}


def write_tars(digits: Path, root: Path) -> None:
    """A tar for each split, with a folder for each class."""
    for split in SHARDS:
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(digits / split, arcname=split)


def write_class_tars(digits: Path, root: Path) -> None:
    """A folder for each split, with a tar for each class."""
    for split in SHARDS:
        (root / split).mkdir()
        for folder in (digits / split).iterdir():
            with tarfile.open(root / split / f"{folder.name}.tar", "w") as tar:
                for file in folder.iterdir():
                    tar.add(file, arcname=file.name)


def write_tars_of_tars(digits: Path, root: Path) -> None:
    """A tar for each split, with a tar for each class, as ImageNet's training images come."""
    write_class_tars(digits, root)
    for split in SHARDS:
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / split, arcname=".")
        shutil.rmtree(root / split)


def write_shards(digits: Path, root: Path) -> None:
    """WebDataset shards of different lengths, and what timm wants to know of them."""
    splits = {}
    for split, number in SHARDS.items():
        shards = [f"digits-{split}-{index:04d}.tar" for index in range(number)]
        lengths = [0] * number
        writers = [webdataset.TarWriter(str(root / shard)) for shard in shards]
        for index, file in enumerate(sorted((digits / split).glob("*/*.png"))):
            shard = index * index % 7 % number
            label = int(file.parent.name.removeprefix("digit_"))
            writers[shard].write({"__key__": f"{file.parent.name}-{file.stem}", "png": file.read_bytes(), "cls": label})
            lengths[shard] += 1
        for writer in writers:
            writer.close()
        assert len(set(lengths)) > 1
        splits[split] = {"name": split, "filenames": shards, "shard_lengths": lengths, "num_samples": sum(lengths)}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))


def write_parquet(digits: Path, root: Path) -> None:
    """Two files of parquet for each split, as on the Hugging Face Hub."""
    for split in SHARDS:
        images = datasets.load_dataset("imagefolder", data_dir=str(digits), split=split, cache_dir=str(root / "cache"))
        for index in range(2):
            part = images.shard(2, index, contiguous=True).cast_column("image", datasets.Image(decode=False))
            part = part.map(lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}})
            part.cast_column("image", datasets.Image()).to_parquet(root / f"{split}-{index:05d}-of-00002.parquet")
    shutil.rmtree(root / "cache")


def at(kind: str) -> Callable[[Path], list[str]]:
    return lambda root: ["--dataset", f"{kind}/{root}", "--data-dir", str(root.parent / "cache")]


def in_folder(*flags: str) -> Callable[[Path], list[str]]:
    return lambda root: ["--data-dir", str(root), *flags]


PATTERNS = {split: f"digits-{split}-{{0000..{number - 1:04d}}}.tar" for split, number in SHARDS.items()}

# Of each reader: what writes its data, its flags in both scripts, those of train.py's splits and validate.py's.
Layout = tuple[Callable[[Path, Path], object], Callable[[Path], list[str]], list[str], list[str]]
LAYOUTS: dict[str, Layout] = {
    "tar": (
        write_tars,
        in_folder(),
        ["--train-split", "train.tar", "--val-split", "validation.tar"],
        ["--split", "validation.tar"],
    ),
    "tar of each class": (write_class_tars, in_folder(), [], []),
    "tar of tars": (
        write_tars_of_tars,
        in_folder(),
        ["--train-split", "train.tar", "--val-split", "validation.tar"],
        ["--split", "validation.tar"],
    ),
    "wds by info": (write_shards, in_folder("--dataset", "wds/"), [], []),
    "wds by pattern": (
        write_shards,
        in_folder("--dataset", "wds/"),
        [
            *("--train-split", PATTERNS["train"], "--train-num-samples", str(TRAIN)),
            *("--val-split", f"{PATTERNS['validation']}|{VALIDATION}"),
        ],
        ["--split", PATTERNS["validation"], "--num-samples", str(VALIDATION)],
    ),
    "wds by command": (
        write_shards,
        lambda root: ["--dataset", "wds/", "--data-dir", f"pipe:cat {root}"],
        [],
        [],
    ),
    "hfds, images": (shutil.copytree, at("hfds"), [], []),
    "hfds, parquet": (write_parquet, at("hfds"), [], []),
    "hfids, parquet": (
        write_parquet,
        at("hfids"),
        ["--train-num-samples", str(TRAIN), "--val-num-samples", str(VALIDATION)],
        ["--num-samples", str(VALIDATION)],
    ),
    "torch": (shutil.copytree, in_folder("--dataset", "torch/image_folder"), [], []),
}
MAP_STYLE = [name for name in LAYOUTS if name.startswith(("tar", "hfds", "torch"))]


def write(name: str, digits: Path, folder: Path) -> tuple[Path, list[str], list[str]]:
    """Write a layout; return its root, and the flags for train.py and validate.py."""
    writer, flags, train_flags, validate_flags = LAYOUTS[name]
    root = folder / "data"
    if writer is not shutil.copytree:
        root.mkdir()
    (folder / "cache").mkdir()
    writer(digits, root)
    return root, [*flags(root), *train_flags], [*flags(root), *validate_flags]


@pytest.fixture(scope="module")
def finished(train: ModuleType, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on the image folders, whose metrics all readers repeat."""
    output = tmp_path_factory.mktemp("finished")
    argv = ["--data-dir", str(digits), "--output", str(output), "--experiment", "run", "--epochs", "2", *SMALL]
    assert train.main(argv) == 0
    return output / "run"


@pytest.fixture
def score(validate: ModuleType, finished: Path, tmp_path: Path) -> Callable[..., dict]:
    """What validate.py says of the finished run."""

    def run(*flags: str) -> dict:
        file = tmp_path / "score.json"
        argv = ["--checkpoint", str(finished), "-b", "16", "-j", "0", "--results-file", str(file), *flags]
        assert validate.main(argv) == 0
        return json.loads(file.read_text())

    return run


@pytest.fixture(scope="module")
def expected(validate: ModuleType, digits: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    file = tmp_path_factory.mktemp("expected") / "score.json"
    argv = ["--data-dir", str(digits), "--checkpoint", str(finished), "-j", "0", "--results-file", str(file)]
    assert validate.main(argv) == 0
    return json.loads(file.read_text())


@pytest.fixture(autouse=True, scope="module")
def offline() -> Iterator[None]:
    """For the scripts that are started here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        yield


def same(found: dict, expected: dict) -> bool:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # summed in another order
    told = ("loss", "dataset", "split")
    return all(found[key] == value for key, value in expected.items() if key not in told)


def run(train: ModuleType, output: Path, *flags: str, epochs: int = 1) -> tuple[int, Path]:
    argv = ["--output", str(output), "--experiment", "run", "--epochs", str(epochs), *SMALL, *flags]
    return train.main(argv), output / "run"


def summary(folder: Path) -> list[dict[str, float]]:
    with open(folder / "summary.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if "error: " in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_reader_trains_and_scores_alike(
    train: ModuleType, digits: Path, tmp_path: Path, score: Callable[..., dict], expected: dict, name: str
) -> None:
    _, train_flags, validate_flags = write(name, digits, tmp_path)
    code, folder = run(train, tmp_path, *train_flags)
    assert code == 0
    (row,) = summary(folder)
    assert 0 < row["train_loss"] < 10
    assert same(score(*validate_flags), expected)
    if name not in MAP_STYLE:  # where each process reads other shards
        assert same(score(*validate_flags, "-j", "2"), expected)


class Killed(BaseException):
    """Nothing in the script catches it, and nothing is saved on the way out."""


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("tar", "--recovery-interval 3"),
        ("hfds, parquet", "--recovery-interval 3"),
        ("wds by info", "-j 2"),
        ("hfids, parquet", "-j 2"),
    ],
)
def test_a_killed_run_ends_as_the_run_that_was_not(
    train: ModuleType, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, flags: str
) -> None:
    """From within an epoch where images are read in any order, else from the last epoch's end: to the last bit."""
    _, train_flags, _ = write(name, digits, tmp_path)
    argv = [*train_flags, *flags.split(), "--aa", "rand-m9-mstd0.5", "--reprob", "0.3", "--mixup", "0.2"]
    code, whole = run(train, tmp_path / "whole", *argv, epochs=2)
    assert code == 0
    update, seen = LossMeter.update, []

    def kill(*arguments: object) -> None:
        seen.append(None)
        if len(seen) == 15:
            raise Killed
        update(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(LossMeter, "update", kill)
        with pytest.raises(Killed):
            run(train, tmp_path / "killed", *argv, epochs=2)
    folder = tmp_path / "killed" / "run"
    assert bool(list(folder.glob("recovery-1-*"))) == (name in MAP_STYLE)
    assert run(train, tmp_path / "killed", *argv, "--resume", str(folder), epochs=2)[0] == 0
    assert_same_runs(folder, whole)


@pytest.mark.parametrize("name", ["wds by info", pytest.param("hfds, parquet", marks=pytest.mark.sweep)])
def test_two_processes_score_every_image_once(
    digits: Path, tmp_path: Path, score: Callable[..., dict], name: str
) -> None:
    """Of three uneven shards one process has two."""
    _, train_flags, validate_flags = write(name, digits, tmp_path)
    run_two_processes("--output", str(tmp_path), "--experiment", "run", "--epochs", "1", *SMALL, *train_flags)
    (row,) = summary(tmp_path / "run")
    one = score(*validate_flags, "--checkpoint", str(tmp_path / "run"))
    assert (row["eval_top1"], row["eval_top5"]) == (one["top1"], one["top5"])
    assert row["eval_loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["tar", "wds by info", "hfds, parquet", "hfids, parquet"])
def test_images_that_do_not_decode_are_named(
    train: ModuleType,
    validate: ModuleType,
    digits: Path,
    finished: Path,
    tmp_path: Path,
    score: Callable[..., dict],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(digits, broken)
    (broken / "validation" / "digit_3" / "2.png").write_bytes(b"no image")
    (broken / "train" / "digit_3" / "2.png").write_bytes(b"no image")
    _, train_flags, validate_flags = write(name, broken, tmp_path)
    code, _ = run(train, tmp_path, *train_flags, "--val-split=", "-j", "2")
    assert code == 0
    which = {"hfds, parquet": "image 4", "hfids, parquet": "image of sha1 "}.get(name, "2.png")
    which = {"wds by info": "digit_3-2"}.get(name, which)
    assert "1 images do not decode" in caplog.text
    assert f"{which}" in caplog.text
    argv = ["--checkpoint", str(finished), "-j", "0", *validate_flags]
    assert validate.main(argv) == 1
    assert "1 images do not decode, the first is " in refusal(capsys)
    found = score(*validate_flags, "--skip-bad-images")
    (broken / "validation" / "digit_3" / "2.png").unlink()
    assert same(found, score("--data-dir", str(broken)))


def bad_run(train: ModuleType, digits: Path, tmp_path: Path, name: str, harm: Callable[[Path], object], *flags) -> int:
    root, train_flags, _ = write(name, digits, tmp_path)
    harm(root)
    return run(train, tmp_path, *train_flags, *flags)[0]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_at_a_member(file: Path) -> None:
    """Lose the last images as a copy that broke off would, at a place where tar sees no fault."""
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-4].offset
    file.write_bytes(file.read_bytes()[:end])


def relabel(root: Path) -> None:
    file = root / "digits-validation-0000.tar"
    with webdataset.TarWriter(str(file)) as writer:
        for index in range(17):
            writer.write({"__key__": str(index), "png": png(), "cls": 10})


def rename_images(root: Path) -> None:
    with webdataset.TarWriter(str(root / "digits-train-0000.tar")) as writer:
        writer.write({"__key__": "a", "jpeg": png(), "cls": 1})


def drop_labels(root: Path) -> None:
    with webdataset.TarWriter(str(root / "digits-train-0000.tar")) as writer:
        writer.write({"__key__": "a", "png": png(), "json": b"{}"})


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "png")
    return stream.getvalue()


def stale_index(file: Path) -> None:
    file.touch()
    os.utime(file, (0, 0))


def empty_tar(file: Path) -> None:
    tarfile.open(file, "w").close()


@pytest.mark.parametrize(
    ("name", "harm", "flags", "code", "sentence"),
    [
        ("wds by info", lambda root: (root / "digits-train-0001.tar").unlink(), "", 2, "there is no file"),
        ("wds by info", lambda root: truncate(root / "digits-validation-0001.tar"), "", 2, "was cut off"),
        ("wds by info", lambda root: cut_at_a_member(root / "digits-validation-0001.tar"), "", 2, "was cut off"),
        ("wds by pattern", lambda root: None, "--val-num-samples 51", 1, "read 50 images, and wds/ is said to hold 51"),
        ("wds by info", relabel, "", 1, "an image has label 10, and the model classes 0 to 9"),
        ("wds by info", rename_images, "-j 2", 1, "has no jpg;png;webp, but cls, jpeg: give --input-key"),
        ("wds by info", drop_labels, "", 1, "has no cls: give --target-key"),
        ("wds by info", lambda root: (root / "_info.json").unlink(), "", 2, "split train not found in info"),
        ("wds by info", lambda root: (root / "_info.json").write_text('{"splits": {"train": {}}}'), "", 2, "lacks"),
        ("wds by info", lambda root: None, "-j 5", 2, "4 shards for 5 processes that read"),
        ("wds by info", lambda root: None, "--aug-splits 2", 2, "--aug-splits needs data that is read in any order"),
        ("wds by info", lambda root: None, f"--train-split {PATTERNS['train']}", 2, "give --train-num-samples"),
        ("wds by info", lambda root: None, f"--val-split {PATTERNS['validation']}", 2, "give --val-num-samples"),
        ("hfids, parquet", lambda root: None, "-j 3", 1, "Reduce the number of loader workers"),
        ("hfds, parquet", lambda root: None, "--val-split test", 2, 'Unknown split "test"'),
        ("hfds, parquet", lambda root: None, "--input-key picture", 2, "no picture, but image, label: give"),
        ("hfds, parquet", lambda root: None, "--target-key name", 2, "no name, but label: give --target-key"),
        ("tar", lambda root: truncate(root / "train.tar"), "", 2, "was cut off"),
        ("tar", lambda root: empty_tar(root / "validation.tar"), "", 2, "it holds no images"),
        ("tar", lambda root: stale_index(root / "_train_tarinfos.pickle"), "", 2, "is older than"),
        ("tar", lambda root: None, "--target-key label", 2, "--target-key names a field"),
        ("tar", lambda root: None, "--train-split train", 2, "Found 0 images"),
        (
            "tar of each class",
            lambda root: empty_tar(root / "train" / "digit_4.tar"),
            "",
            2,
            "digit_4.tar holds no images",
        ),
        ("torch", lambda root: None, "--dataset torch/nothing", 2, "Unknown torchvision dataset nothing"),
        ("torch", lambda root: None, "--dataset wsd/digits", 2, "wds/NAME, hfds/NAME"),
    ],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_faults_are_one_sentence(
    train: ModuleType,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    harm: Callable[[Path], object],
    flags: str,
    code: int,
    sentence: str,
) -> None:
    assert bad_run(train, digits, tmp_path, name, harm, *shlex.split(flags)) == code
    assert sentence in refusal(capsys)


@pytest.mark.parametrize(
    ("dataset", "module", "package"),
    [
        ("wds/", "webdataset", "webdataset"),
        ("hfds/digits", "datasets", "datasets"),
        ("hfids/digits", "datasets", "datasets"),
        ("tfds/digits", "tensorflow", "tensorflow"),
    ],
)
def test_a_package_that_is_not_installed_is_named(
    train: ModuleType,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    dataset: str,
    module: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run(train, tmp_path, "--data-dir", str(digits), "--dataset", dataset)[0] == 2
    expected = f"--dataset {dataset} needs {module}, which is not installed: pip install {package}"
    assert capsys.readouterr().err.strip() == f"train.py: error: {expected}"


def test_validation_names_its_own_flag_where_the_count_is_wrong(validate, digits, finished, tmp_path, capsys):
    _, _, flags = write("wds by pattern", digits, tmp_path)
    argv = ["--checkpoint", str(finished), "-b", "16", "-j", "0", *flags, "--num-samples", "51"]
    assert validate.main(argv) == 1
    assert "read 50 images, and wds/ is said to hold 51" in (said := capsys.readouterr().err.splitlines()[-1])
    assert said.endswith("or in --num-samples")
