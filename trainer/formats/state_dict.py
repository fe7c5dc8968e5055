"""State dicts that torch.save wrote: a zip of a pickle, which says what the tensors are, and of their bytes.

What a file holds may be a stranger's. No code in it runs, and nothing is made of it that is larger than the file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from actcache.arguments import shown
from actcache.errors import ManifestError
from actcache.files import NoFile, contents_of_any_size
from actcache.machine.limits import lacked

# That of an SAE takes 1 kB. Python's hash() of a tuple within a tuple, 250,000 deep, ends the process.
MOST_PICKLE_BYTES = 1 << 15
# Tensors, tuples or lists that stand in a pickle once more by reference; an SAE has none. 60 tuples, each of which
# holds the one before twice, would be hashed or printed for ever.
MOST_REPEATED = 8
# All that a pickle of tensors names. Of what else torch lets it name, some takes memory that the file does not hold.
TENSOR_PARTS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch\._utils _rebuild_parameter|torch \w+Storage"
)
COMPILED = "_orig_mod."  # stands in each name of a state dict of a module that torch.compile has wrapped
WAY_OUT = "save its tensors alone with torch.save(dictionary.state_dict(), path)"
# what torch.load, zipfile and pickletools raise of bytes that are malformed
_MALFORMED = (
    *(RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError, OverflowError),
    *(zipfile.BadZipFile, struct.error),
)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict.

    Raises:
        ManifestError: there is no such file, it holds anything else, or a tensor of it is larger than the file.
        OSError: it cannot be read.
    """
    try:
        stored = torch.load(_plain_zip(contents_of_any_size(path)), map_location="cpu", weights_only=True)
        if not isinstance(stored, dict):
            raise ValueError(f"a {type(stored).__name__}")
        tensors = uncompiled({str(name): value.detach() for name, value in stored.items() if isinstance(value, Tensor)})
        for name, tensor in tensors.items():
            _check_size(name, tensor)
    except NoFile as error:
        raise _refused(path, f"no file ({error.strerror})") from error
    except pickle.UnpicklingError:  # its message is advice to run the code that the pickle holds
        raise _refused(path, "a pickle that holds more, and could run any code") from None
    except _MALFORMED as error:
        if lacked(error) is not None:
            raise
        said = str(error).strip().splitlines()
        raise _refused(path, f"{type(error).__name__}: {said[0] if said else 'empty'}") from error
    return tensors


def uncompiled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that they have in a module which torch.compile has not wrapped."""
    plain = {name.replace(COMPILED, ""): tensor for name, tensor in tensors.items()}
    return plain if len(plain) == len(tensors) else tensors


def _refused(path: Path, got: str) -> ManifestError:
    return ManifestError(f"import: {path} must be a state dict of tensors, got {got[:300]}; {WAY_OUT}")


def _plain_zip(data: bytes) -> io.BytesIO:
    """The same zip, written anew, if it is as torch.save writes it: nothing compressed, nothing twice.

    So torch reads what is checked here, and not what it might find in the same bytes by another reading.
    """
    plain = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(plain, "w") as copy:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("a zip with compressed parts")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("a zip with two parts of one name")
        if sum(member.file_size for member in members) > len(data):
            raise ValueError("a zip with parts that overlap")
        for member in members:
            content = archive.read(member)
            if member.filename.rpartition("/")[2] == "data.pkl":
                _check_pickle(content)
            copy.writestr(member.filename, content)
    plain.seek(0)
    return plain


def _check_pickle(content: bytes) -> None:
    """Raise UnpicklingError if a pickle names anything but TENSOR_PARTS, and ValueError if it is long or repeats."""
    if len(content) > MOST_PICKLE_BYTES:
        raise ValueError(f"a pickle of {len(content):,} bytes")
    last, is_name, n_repeated = "", dict[object, bool](), 0  # is_name: of each slot of the pickle's memo
    for opcode, argument, _ in pickletools.genops(content):
        if "GLOBAL" in opcode.name and not TENSOR_PARTS.fullmatch(str(argument)):
            raise pickle.UnpicklingError(str(argument))
        if "PUT" in opcode.name:
            is_name[argument] = last in ("GLOBAL", "BINUNICODE", "SHORT_BINSTRING")
            continue
        n_repeated += "GET" in opcode.name and not is_name.get(argument, False)
        last = opcode.name
    if n_repeated > MOST_REPEATED:
        raise ValueError(f"a pickle that repeats its parts {n_repeated:,} times")


def _check_size(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor has more elements than its storage, and so repeats some."""
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        raise ValueError(f"{shown(name)} of shape {shown(list(tensor.shape))} in {held:,} bytes")
