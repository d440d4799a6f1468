"""Recognise files that are not what their names say, from their first bytes."""

from __future__ import annotations

HEAD = 512  # bytes needed to recognise a file
_LFS = b"version https://git-lfs.github.com/spec/"
_SAVE = "save the model as safetensors"


def describe(head: bytes, name: str) -> tuple[str, str] | None:
    """What a file of weights really is, and what to do next. None if its first bytes (at most HEAD of them) do not tell."""
    text = head.lstrip().lower()
    if not head:
        return "the file is empty", "the download or copy was cut off: fetch it again"
    if not head.strip(b"\0"):
        return "the file begins with zeros only", "the download or copy was cut off: fetch it again"
    if head.startswith(_LFS):
        return "a Git LFS pointer, not the file", "fetch the file itself: git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "a web page, not the file",
            "the download used the address of a page: use the link to the file itself (/resolve/)",
        )
    if head.startswith(b"GGUF"):
        return "a GGUF file, which holds weights quantised for llama.cpp", "name the checkpoint that it was converted from"
    if head.startswith(b"\x89HDF\r\n"):
        return "an HDF5 file, as Keras writes them", _SAVE
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "a compressed archive", "unpack it, and name what is in it"
    torch_file = name.endswith((".bin", ".pt", ".pth", ".ckpt"))
    if not torch_file and head.startswith(b"PK\x03\x04"):
        return "a PyTorch or zip file named as safetensors", "if torch.save wrote it, rename it to .bin; else unpack it"
    if not torch_file and head.startswith(b"\x80") and head[1:2] in b"\x02\x03\x04\x05":
        return "a pickle named as safetensors", "rename it to .bin if torch.save wrote it"
    if torch_file and len(head) > 9 and head[8:9] == b"{" and not any(head[4:8]):
        return "a safetensors file named as a PyTorch file", "rename it to .safetensors"
    if text.startswith((b"{", b"[")):
        return "a JSON file, not weights", "name the file with the weights"
    return None
