"""Weights of compressed-tensors: its own compressors write and read them, and peru reads the same file. Counts entries that differ.

    /opt/oracles/real/bin/python benchmarks/oracles/compressed_tensors_values.py

Needs compressed-tensors 0.20 beside peru, in a separate virtual environment. Weights of random shapes are compressed with scales
by tensor, channel, group and block, as FP8 and as 8-bit integers, with scales in float32, bfloat16 and float16. Exits with 1 if
an entry of a compressor's decompressed weight is not peru's to the bit."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from peru_cli.checkpoints.resolve import open_model

KINDS = {"float": ("float-quantized", 448.0), "int": ("int-quantized", 127.0)}
STRATEGIES = {
    "tensor": ({}, None),
    "channel": ({}, (1, 0)),
    "group": ({"group_size": 32}, (1, 32)),
    "block": ({"block_structure": [128, 128]}, (128, 128)),
}
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def scales(weight: torch.Tensor, block: tuple[int, int] | None, largest: float, dtype: torch.dtype) -> torch.Tensor:
    """The scale that gives the largest weight of each block the largest code; a block of length 0 spans its axis."""
    if block is None:
        return (weight.abs().max() / largest).to(dtype).reshape(1)
    rows, columns = (size or whole for size, whole in zip(block, weight.shape, strict=True))
    parts = [[part.abs().max() for part in band.split(columns, 1)] for band in weight.split(rows, 0)]
    return (torch.tensor(parts) / largest).to(dtype)


def main() -> None:
    """See the module."""
    torch.manual_seed(0)
    wrong = 0
    for kind, (layout, largest) in KINDS.items():
        compressor = BaseCompressor.get_value_from_registry(layout)
        for strategy, (more, block) in STRATEGIES.items():
            args = QuantizationArgs(num_bits=8, type=kind, strategy=strategy, symmetric=True, **more)
            scheme = QuantizationScheme(targets=["Linear"], weights=args)
            for dtype in TORCH.values():
                weights = {f"layers.{i}": torch.randn(shape) for i, shape in enumerate([(256, 384), (130, 192), (512, 64)])}
                tensors, expected = {}, {}
                for name, weight in weights.items():
                    given = {"weight": weight.to(dtype), "weight_scale": scales(weight, block, largest, dtype)}
                    stored = compressor.compress(given, scheme)
                    tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in stored.items() if part != "weight_zero_point"}
                    expected[f"{name}.weight"] = compressor.decompress(stored, scheme)["weight"]
                groups = {"group_0": scheme.model_dump(mode="json")}
                said = {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}
                config = {"torch_dtype": str(dtype)[6:], "quantization_config": said}
                with tempfile.TemporaryDirectory() as folder:
                    save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
                    (Path(folder) / "config.json").write_text(json.dumps(config))
                    with open_model(folder) as model:
                        off = 0
                        for name, tensor in expected.items():
                            info = model.tensors[name]
                            ours = torch.frombuffer(bytearray(model.read(name)), dtype=TORCH[info.dtype.name]).view(info.shape)
                            off += int((ours.double() != tensor.double()).sum()) if ours.shape == tensor.shape else tensor.numel()
                            off += 0 if ours.dtype is tensor.dtype else tensor.numel()
                wrong += off
                entries = sum(tensor.numel() for tensor in expected.values())
                print(f"{layout:16} by {strategy:8} scales {str(dtype)[6:]:9} {off} of {entries:,} entries differ", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
