"""The whole way of a model: the demo trains it, the Hub has it, a stranger loads it, measures it and exports it.

    pytest tests/test_whole_way.py

runs the commands of the README one after the other, each in its own process, with a Hub on the loopback interface.
"""

import json
import subprocess
import sys
from pathlib import Path

from hub_server import TOKEN, HubServer, environment

ROOT = Path(__file__).parent.parent
REPO = "me/digits_ditac"

# What somebody writes who has never seen the run: nothing but public names.
STRANGER = """
import sys, onnxruntime, timm, torch, ditac_timm

model = timm.create_model(f"hf-hub:{sys.argv[1]}", pretrained=True).eval()
config = timm.data.resolve_data_config(model=model)
digits = timm.data.create_dataset("", sys.argv[2], split="validation", input_img_mode="L")
images = timm.data.create_loader(digits, batch_size=64, use_prefetcher=False, **config)
session, right, right_in_onnx = onnxruntime.InferenceSession(sys.argv[3]), 0, 0
for x, label in images:
    with torch.no_grad():
        right += (model(x).argmax(1) == label).sum().item()
    right_in_onnx += (session.run(None, {"images": x.numpy()})[0].argmax(1) == label.numpy()).sum()
print(right, right_in_onnx, len(digits))
"""


def test_train_publish_load_validate_export(server: HubServer, tmp_path: Path) -> None:
    """One top-1: at the end of training, on the model's page, from the Hub, in plain timm, and in ONNX Runtime."""
    variables = environment(server, tmp_path / "hub") | {"PYTHONPATH": str(ROOT)}

    def python(*argv: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, argv)],
            cwd=tmp_path,
            env=variables,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout

    python(ROOT / "demo.py", "--output", "demo", "--epochs", "2")  # trains, and validates what it saved
    results, data = tmp_path / "demo" / "validation.json", tmp_path / "demo" / "digits"
    measured = json.loads(results.read_text())
    assert 20 < measured["top1"] < 100
    run = "demo/mobilenetv3_ditac"
    python(ROOT / "publish.py", "--checkpoint", run, "--results", results, "--repo-id", REPO)
    assert f"{measured['top1']}".encode() in server.files(REPO)["README.md"]

    python(ROOT / "validate.py", "--model", f"hf-hub:{REPO}", "--data-dir", data, "--results-file", "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    for key in ("top1", "top5", "loss", "images", "weights_sha256"):
        assert again[key] == measured[key]

    python(ROOT / "export.py", "--model", f"hf-hub:{REPO}", "--pretrained", "--output", "digits.onnx")  # and compares
    right, right_in_onnx, number = map(int, python("-c", STRANGER, REPO, data, "digits.onnx").split())
    assert right == right_in_onnx == round(measured["top1"] * number / 100)
    assert number == int(measured["images"])
