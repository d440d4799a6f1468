"""Make the demo family that ships inside peru: one small ViT base and four fine-tunes of it.

    python benchmarks/models/demo_family.py --data ../shared/data --out peru_cli/demo/data

The base learns the three image sets through a throw-away head, and never sees `digits`. For each task
a head is fitted on the frozen base; then the head is frozen and the encoder fine-tuned by SGD with momentum.
Test images are only written out: what is printed are accuracies on a held-out part of the train split.
Everything is seeded and single-threaded: a second run on the same machine writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTModel

SIDE = 28
IMAGE_TASKS = ("fashion_mnist", "notmnist", "sign_digits")
TASKS = (*IMAGE_TASKS, "digits")
TEST_LIMIT, HEAD_IMAGES, HEAD_DECAY = 1000, 50, 1e-3
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LR = 3600, 96, 2e-3
FINETUNE_STEPS, FINETUNE_BATCH, FINETUNE_LR = 500, 64, 0.02
PREPROCESSOR: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "do_convert_rgb": False, "do_resize": False}
PREPROCESSOR |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5], "image_std": [0.5]}

ATTRIBUTION = """\
# Where the demo's images come from

`base/` and `fine-tunes/` were trained by `benchmarks/models/demo_family.py` on parts of the train splits of the four
sets below, and on nothing else; `images/` holds up to 1000 images of each test split, which no training saw.

| set | what | source | licence as stated there | changes |
| --- | --- | --- | --- | --- |
ROWS
| digits | handwritten digits | scikit-learn's `load_digits`, a copy of the test part of \
[Optical Recognition of Handwritten Digits](https://archive.ics.uci.edu/dataset/80) (E. Alpaydin, C. Kaynak, \
1998; UCI Machine Learning Repository) | scikit-learn: BSD-3-Clause | split by seed; 8x8 values 0-16 scaled \
to 0-255, then resized to 28x28 |

The images remain under the licences of their sets, whose notices follow.

**MIT licence** (Fashion-MNIST: Copyright (c) 2017 Zalando SE, https://tech.zalando.com; notMNIST-to-MNIST: Copyright (c) 2016
David Flanagan; first published at http://yaroslavvb.blogspot.com/2011/09/notmnist-dataset.html):

> Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation files (the
> "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, modify, merge, publish,
> distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so, subject
> to the following conditions: The above copyright notice and this permission notice shall be included in all copies or substantial
> portions of the Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED
> TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
> HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF
> OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

**Apache License 2.0** (Sign Language Digits Dataset: Copyright 2017 Arda Mavi; by students of Turkey Ankara Ayranci Anadolu High
School, led by Zeynep Dikle and Arda Mavi; Mavi, A. (2020), arXiv:2011.08927; changed as the table says):

> Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the License. You may
> obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing,
> software distributed under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express
> or implied. See the License for the specific language governing permissions and limitations under the License.

**BSD 3-Clause licence** (scikit-learn's copy of the digits), in the words of scikit-learn:

BSD
"""


@dataclass
class Task:
    """One data set: pixel values and labels for training and for choices, raw uint8 images for testing."""

    classes: list[str]
    train_x: Tensor
    train_y: Tensor
    held_x: Tensor
    held_y: Tensor
    test_x: NDArray[np.uint8]
    test_y: NDArray[np.uint8]


def to_side(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Resize images to 28x28 (images of that size are unchanged), in grey."""
    resized = [Image.fromarray(i).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR) for i in images]
    return np.stack([np.asarray(i) for i in resized])


def pixel_values(images: NDArray[np.uint8]) -> Tensor:
    """uint8 images (n, 28, 28) as the model's input (n, 1, 28, 28)."""
    return (torch.from_numpy(images).float() / 127.5 - 1).unsqueeze(1)


def load_task(name: str, data: Path) -> Task:
    """Read one task and hold out a part of its train split: a tenth, but at least 250 images."""
    if name == "digits":
        bunch = load_digits()
        x = (bunch.images * (255 / 16)).round().astype(np.uint8)
        y = bunch.target.astype(np.uint8)
        order = np.random.default_rng(7).permutation(len(x))
        train_x, train_y, test_x, test_y = x[order[450:]], y[order[450:]], x[order[:450]], y[order[:450]]
        classes = [str(c) for c in bunch.target_names]
    else:
        with np.load(data / "image" / f"{name}.npz") as file:
            order = np.random.default_rng(8).permutation(len(file["train_x"]))
            test = np.random.default_rng(7).permutation(len(file["test_x"]))[:TEST_LIMIT]
            train_x, train_y = file["train_x"][order], file["train_y"][order]
            test_x, test_y = file["test_x"][test], file["test_y"][test]
            classes = [str(c) for c in file["classes"]]
    held = max(250, len(train_x) // 10)
    pixels, labels = pixel_values(to_side(train_x)), torch.from_numpy(train_y.astype(np.int64))
    return Task(classes, pixels[held:], labels[held:], pixels[:held], labels[:held], to_side(test_x), test_y)


def vit_config(classes: list[str] | None = None) -> ViTConfig:
    """The shape that base and fine-tunes share: 0.51M parameters in eight equal layers."""
    names = {} if classes is None else {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    shape = {"hidden_size": 72, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 288}
    return ViTConfig(image_size=SIDE, patch_size=7, num_channels=1, **shape, **names)


def augment(x: Tensor, rng: torch.Generator, *, turn: float, scale: float, shift: float, tone: float, noise: float) -> Tensor:
    """Turn (degrees), scale (log), shift (half sides), change the tone and add noise, each at random."""
    n = len(x)

    def uniform() -> Tensor:
        return torch.rand(n, generator=rng) * 2 - 1

    angle, size, aspect = uniform() * math.radians(turn), uniform() * scale, uniform() * scale / 2
    wide, high = torch.exp(size + aspect), torch.exp(size)
    rows = (
        torch.stack([angle.cos() * wide, -angle.sin() * high, uniform() * shift], 1),
        torch.stack([angle.sin() * high, angle.cos() * high, uniform() * shift], 1),
    )
    grid = functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    x = x * torch.exp(uniform() * tone).view(-1, 1, 1, 1) + (uniform() * tone / 2).view(-1, 1, 1, 1)
    return x + noise * torch.rand(n, 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)


def embed(encoder: ViTModel, x: Tensor) -> Tensor:
    """The class token's last hidden state, which the classifier reads."""
    return encoder(x).last_hidden_state[:, 0]


@torch.no_grad()
def embed_all(encoder: ViTModel, x: Tensor) -> Tensor:
    """`embed` for a whole split."""
    return torch.cat([embed(encoder, part) for part in x.split(250)])


def round_to_bfloat16(module: nn.Module) -> None:
    """Round the float32 parameters to values that bfloat16 can hold."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())


def accuracy(encoder: ViTModel, head: nn.Linear, x: Tensor, y: Tensor) -> float:
    """Percent of the images classified right."""
    with torch.no_grad():
        return 100 * (head(embed_all(encoder, x)).argmax(1) == y).float().mean().item()


def pretrain(tasks: list[Task]) -> ViTModel:
    """Train the base on the union of the tasks' train splits through one head for all their classes."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    encoder = ViTModel(vit_config(), add_pooling_layer=False)
    joint_head = nn.Linear(encoder.config.hidden_size, sum(len(t.classes) for t in tasks))
    x = torch.cat([t.train_x for t in tasks])
    y = torch.cat([t.train_y + 10 * i for i, t in enumerate(tasks)])
    # small tasks occur nearly as often as large ones
    weight = torch.cat([torch.full((len(t.train_x),), len(t.train_x) ** -0.8) for t in tasks])
    parameters = [*encoder.parameters(), *joint_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PRETRAIN_LR, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(PRETRAIN_STEPS):
        # warm-up, then down to a fifth: the fine-tunes do the rest of the annealing
        decay = 0.6 + 0.4 * math.cos(math.pi * step / PRETRAIN_STEPS)
        optimizer.param_groups[0]["lr"] = PRETRAIN_LR * decay * min(1.0, (step + 1) / 200)
        pick = torch.multinomial(weight, PRETRAIN_BATCH, generator=rng)
        views = augment(x[pick], rng, turn=20, scale=0.25, shift=0.12, tone=0.4, noise=0.3)
        loss = functional.cross_entropy(joint_head(embed(encoder, views)), y[pick])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    round_to_bfloat16(encoder)
    return encoder.eval()


def fit_head(encoder: ViTModel, task: Task) -> nn.Linear:
    """Logistic regression on the frozen encoder's outputs for a few images: the encoder should do the learning."""
    features, labels = embed_all(encoder, task.train_x[:HEAD_IMAGES]), task.train_y[:HEAD_IMAGES]
    head = nn.Linear(features.shape[1], len(task.classes))
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(features), labels)
        loss = loss + HEAD_DECAY / 2 * head.weight.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    round_to_bfloat16(head)
    return head.requires_grad_(False)


def fine_tune(encoder: ViTModel, head: nn.Linear, task: Task, seed: int) -> None:
    """Train the whole encoder, in float32 from the bfloat16 base, against the frozen head."""
    rng = torch.Generator().manual_seed(seed)
    parameters = list(encoder.parameters())
    optimizer = torch.optim.SGD(parameters, lr=FINETUNE_LR, momentum=0.9)
    for step in range(FINETUNE_STEPS):
        decay = (1 + math.cos(math.pi * step / FINETUNE_STEPS)) / 2
        optimizer.param_groups[0]["lr"] = FINETUNE_LR * decay * min(1.0, (step + 1) / 30)
        pick = torch.randint(len(task.train_x), (FINETUNE_BATCH,), generator=rng)
        views = augment(task.train_x[pick], rng, turn=10, scale=0.12, shift=0.08, tone=0.1, noise=0)
        loss = functional.cross_entropy(head(embed(encoder, views)), task.train_y[pick])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    round_to_bfloat16(encoder)


def save_fine_tune(encoder: ViTModel, head: nn.Linear, task: Task, folder: Path) -> None:
    """Write a ViTForImageClassification in bfloat16, with the settings that produce its pixel values."""
    model = ViTForImageClassification(vit_config(task.classes))
    model.vit.load_state_dict(encoder.state_dict())
    model.classifier.load_state_dict(head.state_dict())
    model.bfloat16().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def attribution(data: Path) -> str:
    """Where the images come from, their licences, and what was changed, from the sets' meta files."""
    rows = []
    for name in IMAGE_TASKS:
        meta = json.loads((data / "image" / f"{name}.meta.json").read_text())
        link = f"[{meta['src']}](https://github.com/{meta['src']})"
        source = f"{link} at {meta['commit'][:10]}: `{meta['files']}`"
        changes = meta["split"] + (f"; {meta['note']}" if meta["note"] else "")
        if meta["shape"] != [SIDE, SIDE]:
            changes += f"; then resized to {SIDE}x{SIDE}"
        rows.append(f"| {name} | {meta['task']} | {source} | {meta['lic']} | {changes} |")
    terms = metadata.distribution("scikit-learn").read_text("licenses/COPYING") or ""
    quoted = textwrap.indent(terms.split("\n----")[0].strip() + "\n", "> ", lambda _: True)
    return ATTRIBUTION.replace("ROWS", "\n".join(rows)).replace("BSD\n", quoted)


def main() -> None:
    """Make everything. Prints held-out accuracies on the way."""
    parser = argparse.ArgumentParser(description="Make the demo family that ships inside peru.")
    parser.add_argument("--data", type=Path, required=True, help="folder with image/NAME.npz and .meta.json")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)

    tasks = {name: load_task(name, options.data) for name in TASKS}
    base = pretrain([tasks[name] for name in IMAGE_TASKS])
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    for seed, (name, task) in enumerate(tasks.items(), start=10):
        encoder = ViTModel(vit_config(), add_pooling_layer=False).eval()
        encoder.load_state_dict(base.state_dict())
        head = fit_head(encoder, task)
        before = accuracy(encoder, head, task.held_x, task.held_y)
        fine_tune(encoder, head, task, seed)
        after = accuracy(encoder, head, task.held_x, task.held_y)
        print(f"{name}: {before:.1f}% -> {after:.1f}% of {len(task.held_y)} held-out images", flush=True)
        save_fine_tune(encoder, head, task, options.out / "fine-tunes" / name)
        images = {"x": task.test_x, "y": task.test_y.astype(np.uint8), "classes": np.array(task.classes)}
        np.savez_compressed(options.out / "images" / f"{name}.npz", **images)
    base.bfloat16().save_pretrained(options.out / "base")
    (options.out / "ATTRIBUTION.md").write_text(attribution(options.data), encoding="utf-8")


if __name__ == "__main__":
    main()
