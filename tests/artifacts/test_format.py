"""docs/format.md: golden files are compared literally, and read by a reader written from that page alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from peru_cli.artifacts.codecs import PCO
from peru_cli.artifacts.index import EXACT, FROM_BASE, Block, Index, Mode, SideFile, Stream, TensorRecord, decode_index, encode_index
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.errors import BadFile
from tests.golden.make import CASES, Tensors, noise, write_model, write_safetensors
from tests.support.readers.format_reader import (
    BITS,
    DELTA,
    DOCUMENT,
    GOLDEN,
    MANTISSA,
    Array,
    code,
    document_rows,
    read_artifact,
    read_index,
    read_safetensors,
)

# -- golden files -------------------------------------------------------------------------------------


def model(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """Tensors and side files of a checkpoint folder."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "model.safetensors"}
    return read_safetensors((folder / "model.safetensors").read_bytes())[1], files


@pytest.mark.parametrize("name", CASES)
def test_the_writer_produces_the_golden_bytes(tmp_path: Path, peru, name: str) -> None:
    case = CASES[name]()
    write_model(tmp_path / "fine", case.fine, case.fine_files)
    write_model(tmp_path / "base", case.base, case.base_files)
    assert model(tmp_path / "base") == model(GOLDEN / name / "base")
    peru("prune", f"golden={tmp_path}/fine", "-b", tmp_path / "base", "-o", tmp_path / "a.safetensors", "--no-sync", *case.options)
    assert (tmp_path / "a.safetensors").read_bytes() == (GOLDEN / name / "artifact.safetensors").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_a_reader_made_from_the_document_gives_the_expected_result(name: str) -> None:
    case = CASES[name]()
    tensors, files = read_artifact((GOLDEN / name / "artifact.safetensors").read_bytes(), *model(GOLDEN / name / "base"))
    assert tensors == read_safetensors((GOLDEN / name / "expected.safetensors").read_bytes())[1]
    assert files == {file: text.encode() for file, text in case.fine_files.items()}


@pytest.mark.parametrize("name", CASES)
def test_unpack_gives_the_expected_result(tmp_path: Path, peru, name: str) -> None:
    case, folder = CASES[name](), GOLDEN / name
    peru("unpack", folder / "artifact.safetensors", "-b", folder / "base", "-o", tmp_path / "r.safetensors", "--no-sync")
    assert (tmp_path / "r.safetensors").read_bytes() == (folder / "expected.safetensors").read_bytes()
    write_safetensors(tmp_path / "expected.safetensors", case.expected)
    assert (tmp_path / "expected.safetensors").read_bytes() == (folder / "expected.safetensors").read_bytes()
    peru("unpack", folder / "artifact.safetensors", "-b", folder / "base", "-o", tmp_path / "r", "--no-sync")
    assert model(tmp_path / "r")[1] == {file: text.encode() for file, text in case.fine_files.items()}


def test_an_artifact_older_than_the_digests_of_base_files_still_reads(tmp_path: Path, peru) -> None:
    """tests/golden/older.safetensors is `grown` as peru wrote it before `peru.base.files` existed."""
    metadata = read_safetensors((GOLDEN / "older.safetensors").read_bytes())[0]
    assert metadata["peru.base"] == "example/base@0123abc" and "peru.base.files" not in metadata
    peru("unpack", GOLDEN / "older.safetensors", "-b", GOLDEN / "grown" / "base", "-o", tmp_path / "r.safetensors", "--no-sync")
    assert (tmp_path / "r.safetensors").read_bytes() == (GOLDEN / "grown" / "expected.safetensors").read_bytes()


def test_the_digests_of_base_files_are_those_that_git_lfs_and_the_hub_have() -> None:
    metadata = read_safetensors((GOLDEN / "grown" / "artifact.safetensors").read_bytes())[0]
    weights = (GOLDEN / "grown" / "base" / "model.safetensors").read_bytes()
    assert metadata["peru.base.files"] == hashlib.sha256(weights).hexdigest()


def test_golden_files_cover_their_cases() -> None:
    """Each corner case of the format is in one of them."""
    seen = set()
    for name in CASES:
        artifact = (GOLDEN / name / "artifact.safetensors").read_bytes()
        assert len(artifact) < 10_000
        metadata, roles, _ = read_safetensors(artifact)
        tensors, streams, blocks, files = read_index(roles["index"][2])
        seen |= {f"prefix {metadata['peru.prefix'][:1]}", *(key for key in metadata), *roles}
        seen |= {f"mode {t['mode']}" for t in tensors} | {"grown" for t in tensors if t["rows"]}
        seen |= {f"{s['dtype']} {s['rounded']}" for s in streams} | {"apart" for b in blocks if b["apart"]}
        seen |= {f"{t['base_dtype']} to {t['dtype']}" for t in tensors if t["mode"] == DELTA}
        seen |= {f"from base {f['from_base']}" for f in files}
    corners = {"prefix ", "prefix +", "prefix -", "mode 0", "mode 1", "mode 2", "grown", "apart", "from base 0", "from base 1"}
    corners |= {
        "BF16 0",
        "F16 0",
        "BF16 1",
        "F16 1",
        "F32 1",
        "F32 2",
        "BF16 2",
        "F64 2",
        "F32 to BF16",
        *(code(row[0]) for row in document_rows("### Metadata")),
    }
    assert corners | {"blocks", "whole", "files", "index"} <= seen


# -- the same reader on artifacts that are too large for golden files ----------------------------------


def random_patterns(dtype: str, n: int, seed: int) -> Array:
    """Every kind of number: all exponents, NaN payloads, subnormals, zeros of both signs."""
    unsigned = f"<u{BITS[dtype] // 8}"
    bits = noise((n,), seed).astype(unsigned)
    exponent, mantissa = BITS[dtype] - 1 - MANTISSA[dtype], MANTISSA[dtype]
    special = [0, 1, (1 << mantissa) - 1, ((1 << exponent) - 1) << mantissa, (((1 << exponent) - 1) << mantissa) + 1]
    bits[: 2 * len(special)] = [x | s << (BITS[dtype] - 1) for x in special for s in (0, 1)]
    return bits


@pytest.mark.parametrize(
    "options",
    [["--lossless"], ["--keep", "40%"], ["--keep", "3%", "--scope", "tensor", "--values", "exact"], ["--keep", "20%", "--values", "log2"]],
)
def test_the_reader_follows_unpack_through_all_dtypes_and_many_blocks(tmp_path: Path, peru, options: list[str]) -> None:
    base: Tensors = {}
    fine: Tensors = {}
    seed = 100
    for source in MANTISSA:
        for target in MANTISSA:
            base[f"{source}.{target}"] = source, random_patterns(source, 2003, seed := seed + 1)
            fine[f"{source}.{target}"] = target, random_patterns(target, 2003, seed := seed + 1)
    for name, dtype in (("a", "BF16"), ("b", "F32"), ("c", "BF16"), ("d", "F32")):
        bits = random_patterns(dtype, 260_007, seed := seed + 1)
        base[name] = dtype, bits
        fine[name] = dtype, bits + (noise(bits.shape, seed := seed + 1) % np.uint64(3)).astype(bits.dtype)
    write_model(tmp_path / "base", base, {})
    write_model(tmp_path / "fine", fine, {})
    at = ["-b", tmp_path / "base", "--no-sync"]
    peru("prune", tmp_path / "fine", *at, "-o", tmp_path / "a.safetensors", *options)
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "r.safetensors")
    artifact = (tmp_path / "a.safetensors").read_bytes()
    tensors, _ = read_artifact(artifact, *model(tmp_path / "base"))
    assert tensors == read_safetensors((tmp_path / "r.safetensors").read_bytes())[1]
    if options == ["--lossless"]:
        assert tensors == model(tmp_path / "fine")[0]
        assert len(read_index(read_safetensors(artifact)[1]["index"][2])[2]) > 6


def test_changed_counts_tensors_in_which_nothing_is_kept(tmp_path: Path, peru) -> None:
    """Tensors larger than the sample that predicts thresholds; 0 of 1.2 million entries are kept in each."""
    base: Tensors = {name: ("BF16", np.full(1_200_000, 0x3F80, np.uint16)) for name in ("a", "b")}
    fine: Tensors = {name: ("BF16", array + (np.arange(array.size) % 3 == 0).astype(np.uint16)) for name, (_, array) in base.items()}
    write_model(tmp_path / "base", base, {})
    write_model(tmp_path / "fine", fine, {})
    target = tmp_path / "a.safetensors"
    peru("prune", tmp_path / "fine", "-b", tmp_path / "base", "-o", target, "--keep", "0.0000005", "--scope", "tensor", "--no-sync")
    metadata, roles, _ = read_safetensors(target.read_bytes())
    assert (metadata["peru.changed"], metadata["peru.kept"], list(roles)) == ("800000", "0", ["index"])
    assert read_artifact(target.read_bytes(), *model(tmp_path / "base"))[0] == model(tmp_path / "base")[0]


# -- what a reader checks, on files with a valid seal --------------------------------------------------------


def sealed(artifact: bytes, old: bytes, new: bytes) -> bytes:
    """The artifact with a change of equal length in its header, sealed again."""
    _, roles, header = read_safetensors(artifact)
    assert header.count(old) == 1 and len(old) == len(new)
    changed = header.replace(old, new)
    at = changed.index(b'"peru.digest":"') + len(b'"peru.digest":"')
    seal = blake3(b"peru header 1\0" + changed[:at] + b"0" * 64 + changed[at + 64 :] + roles["index"][2]).hexdigest()
    return changed[:at] + seal.encode() + changed[at + 64 :] + artifact[len(header) :]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"peru.kept":"139"', b'"peru.kept":"138"', "its index has 139"),
        (b'"peru.entries":"1392"', b'"peru.entries":"0139"', "'0139'"),
        (b'"peru.task":"golden"', b'"peru.task":"../old"', "'../old'"),
        (b'"peru.result":', b'"peru.resort":', "lacks 'peru.result'"),
        (b'"peru.prefix":"+bert."', b'"peru.prefix":"*bert."', "'*bert.'"),
        (b'"peru.density":"1/10"', b'"peru.density":"0.10"', "'0.10'"),
        (b'"peru.kind":"sparse-delta"', b'"peru.kind":"sparse-gamma"', "sparse-gamma"),
        (b'"peru.format":"1"', b'"peru.format":"2"', "format '2'"),
    ],
)
def test_metadata_is_checked(tmp_path: Path, peru, old: bytes, new: bytes, message: str) -> None:
    artifact = (GOLDEN / "heads" / "artifact.safetensors").read_bytes()
    for content, expected in ((artifact.replace(old, new), None), (sealed(artifact, old, new), message)):
        (tmp_path / "a.safetensors").write_bytes(content)
        peru("unpack", tmp_path / "a.safetensors", "-b", GOLDEN / "heads" / "base", "-o", tmp_path / "r.safetensors", code=1)
        assert expected is None or expected in peru.stderr
    assert sealed(artifact, old, old) == artifact


def test_padding_is_sealed(tmp_path: Path, peru) -> None:
    artifact = bytearray((GOLDEN / "heads" / "artifact.safetensors").read_bytes())
    end = len(read_safetensors(artifact)[2])
    assert artifact[end - 1 : end] == b" "
    artifact[end - 1 : end] = b"\t"  # still white space to a JSON parser
    (tmp_path / "a.safetensors").write_bytes(artifact)
    peru("unpack", tmp_path / "a.safetensors", "-b", GOLDEN / "heads" / "base", "-o", tmp_path / "r.safetensors", code=1)
    assert "altered" in peru.stderr


def test_an_index_beyond_its_limits_is_refused() -> None:
    """Endless numbers, names that front coding inflates, blocks larger than their entries."""
    with pytest.raises(BadFile, match="number above"):
        decode_index(b"\x01" + b"\x80" * 1000 + b"\x01")
    varint = lambda n: bytes([n & 127 | 128, n >> 7 & 127 | 128, n >> 14])  # noqa: E731
    scalar = b"\0\x05\0" + bytes(16)  # WHOLE, U8, no dimensions, digest
    long = b"a" * 1_000_000
    names = b"\0" + varint(len(long)) + long + scalar
    names += b"".join(varint(len(long) + i) + b"\x01a" + scalar for i in range(120))
    with pytest.raises(BadFile, match="names"):
        decode_index(b"\x01" + bytes([121]) + names)
    index = bytearray(read_safetensors((GOLDEN / "tiny" / "artifact.safetensors").read_bytes())[1]["index"][2])
    sizes = index.index(b"\x0c\x09")
    index[sizes : sizes + 1] = varint(2 * 8 + 2**16 + 1)
    with pytest.raises(BadFile, match="number above"):
        decode_index(bytes(index))


def two_blocks() -> Index:
    """A stream of 7 kept entries in two blocks, of one tensor of 10 entries and one that grew from 3 rows of 2 to 4."""
    bf16, digest = BY_NAME["BF16"], bytes(16)
    tensors = [
        TensorRecord(TensorInfo("a", bf16, (10,)), Mode.DELTA, b"", bf16, 0, digest, 5),
        TensorRecord(TensorInfo("b", bf16, (4, 2)), Mode.DELTA, digest, bf16, 3, digest, 2),
    ]
    blocks = [Block(0, 0, 4, False, 9, 9, 0, digest), Block(0, 5, 3, True, 9, 9, 0, digest)]
    return Index(tensors, [Stream(bf16, EXACT, PCO, PCO, 4, 7)], blocks, [])


def test_an_index_is_read_up_to_its_limits_and_not_beyond() -> None:
    """Each field at its limit is read back, and one more is refused."""

    def at(change: Callable[[Index], object]) -> Index:
        index = two_blocks()
        change(index)
        return index

    def rows(index: Index, base: int, kept: int) -> None:
        index.tensors[1].base_rows, index.tensors[1].kept = base, kept
        index.streams[0].kept = 5 + kept
        index.blocks[1].count = 1 + kept

    def files(index: Index, *names: str) -> None:
        index.files = [SideFile(name, FROM_BASE, 5, bytes(16)) for name in names]

    def second(name: str, value: int) -> Callable[[Index], object]:
        return lambda index: setattr(index.blocks[1], name, value)

    limit = 8 * 3 + (1 << 16)
    for good, bad, what in (
        (second("origin", 4), second("origin", 3), "does not follow"),
        (second("origin", 15), second("origin", 16), "beyond its end"),
        (lambda i: None, lambda i: setattr(i.blocks[0], "origin", 1), "does not follow"),
        (second("positions_bytes", limit), second("positions_bytes", limit + 1), "number above"),
        (second("values_bytes", limit), second("values_bytes", limit + 1), "number above"),
        (lambda i: rows(i, 3, 3), lambda i: rows(i, 4, 3), "grew from 4 rows"),
        (lambda i: rows(i, 1, 2), lambda i: rows(i, 1, 3), "number above"),
        (lambda i: rows(i, 0, 2), lambda i: setattr(i.tensors[1], "kept", 1), "its tensors 6"),
        (lambda i: files(i, "config.json", "vocab.json"), lambda i: files(i, "vocab.json", "config.json"), "not in order"),
        (lambda i: files(i, "config.json"), lambda i: files(i, "config.json", "config.json"), "not in order"),
    ):
        assert decode_index(encode_index(at(good))) is not None
        with pytest.raises(BadFile, match=what):
            decode_index(encode_index(at(bad)))
    assert decode_index(encode_index(two_blocks())) == two_blocks()


def test_rows_that_the_base_lacks_count_as_stored_whole() -> None:
    grown, plain = two_blocks().tensors[1], two_blocks().tensors[0]
    assert (grown.base_shape, grown.base_entries, grown.whole_bytes) == ((3, 2), 6, 4)
    assert (plain.base_shape, plain.base_entries, plain.whole_bytes) == ((10,), 10, 0)
    assert TensorRecord(plain.info, Mode.WHOLE).whole_bytes == 20


# -- the document and the code agree -------------------------------------------------------------------------


def test_dtype_codes_in_the_document_match_the_code() -> None:
    from peru_cli.checkpoints.dtypes import BY_CODE

    rows = [(int(number), name, int(bits), mark == "yes") for number, name, bits, mark in document_rows("### Dtype codes")]
    assert rows == [(d.code, d.name, d.bits, d.compressible) for d in sorted(BY_CODE.values(), key=lambda d: d.code)]


def test_metadata_keys_and_patterns_match_the_code() -> None:
    from peru_cli.artifacts.sparse_delta import METADATA, OPTIONAL

    rows = {code(key): (code(pattern), required) for key, required, pattern, _ in document_rows("### Metadata")}
    assert rows.pop("peru.digest") == ("[0-9a-f]{64}", "yes")
    assert rows == {key: (pattern, "no" if key in OPTIONAL else "yes") for key, pattern in METADATA.items()}


def test_limits_in_the_document_match_the_code() -> None:
    from peru_cli.artifacts import bytestream, codecs, container, index
    from peru_cli.checkpoints import header, sidefiles

    assert container.MAX_INDEX_BYTES == 2**30 and tuple(code(row[0]) for row in document_rows("## Container")) == container.ROLES
    assert (bytestream.MAX_NAMES_BYTES, index.MAX_BLOCK_ENTRIES, index.BLOCK_ENTRIES) == (10**8, 2**22, 2**17)
    assert (header.MAX_ENTRIES, header.MAX_DIMENSIONS, sidefiles.MAX_SIDE_FILE_BYTES) == (2**62, 64, 64_000_000)
    assert (index.Mode.WHOLE, index.Mode.DELTA, index.Mode.COPY, index.EXACT, index.ROUNDED, index.NOT_ROUNDED) == (0, 1, 2, 0, 1, 32704)
    assert (index.STORED, index.FROM_BASE, codecs.RAW, codecs.PCO) == (0, 1, 0, 1)


def test_side_file_names_in_the_document_match_the_code() -> None:
    from peru_cli.checkpoints.sidefiles import is_side_file_name

    section = DOCUMENT.split("\n## Side files\n", 1)[1].split("\n## ", 1)[0]
    names = re.findall(r"`([^`]+)`", section.split("with NAME in", 1)[1])
    plain = [f"{n}.json" for n in names if "." not in n]
    others = [n.replace("*", "any") for n in names if "." in n]
    assert len(plain) == 17 and len(others) == 7
    assert all(map(is_side_file_name, plain + others))
    refused = [
        "modeling.py",
        "../config.json",
        "sub/config.json",
        ".model",
        "model.safetensors",
        "é.model",
        "x.json",
        "a" * 125 + ".spm",
        "",
    ]
    assert not any(map(is_side_file_name, refused))


def test_the_worked_example_is_the_golden_file() -> None:
    lines = DOCUMENT.split("\n## A worked example\n", 1)[1].split("```")[1].splitlines()
    shown = bytes.fromhex(" ".join(re.match(r"(?:[0-9a-f]{2} )*[0-9a-f]{2}(?=   )", line).group() for line in lines if line))
    artifact = (GOLDEN / "tiny" / "artifact.safetensors").read_bytes()
    assert artifact[960:] == shown and len(read_safetensors(artifact)[2]) == 960
