"""Atomic writes, pages, the lock of a folder, and the safe reading of torch files from strangers.

Every file is written under a temporary name, flushed, synced, then renamed: a crash leaves the old file or the new one.
"""

import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.distributed import first_rank, rank
from utils import InputError, one_line, warn

if os.name == "nt":
    import msvcrt
else:
    import fcntl


def temporary_name(number: int) -> str:
    """Return a name for an unfinished file of this process; a short one, since long names have a limit."""
    return f".cyclegan-{os.getpid()}-{number}.tmp"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` if the block succeeds, and is removed if it fails."""
    temporary = path.with_name(temporary_name(threading.get_native_id()))
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process with our number; perhaps a link to a good file
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        if error.errno:
            error.filename = str(path)  # the user does not know the temporary name
            error.filename2 = None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """Rename such that even after a power cut the target is the old file or the new one."""
    source.replace(target)
    if os.name == "posix":  # the new name is on the disk once its folder is synced
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; it becomes `folder`, which must not exist, if the block succeeds, else it is removed."""
    if folder.exists():
        raise InputError(f"{folder}: exists already; move it away, or choose another name where there is a choice")
    unfinished = folder.with_name(f".{os.getpid()}.{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process with our number
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@first_rank
def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def to_json(value: object) -> str:
    """Return readable JSON; paths become text, numbers that are not finite become null."""
    plain = json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)
    return json.dumps(plain, indent=1) + "\n"


def write_json(path: Path, value: object) -> None:
    """Write readable JSON atomically."""
    write_text(path, to_json(value))


def sha256(path: Path) -> str:
    """Return the SHA-256 hash of a file's contents in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):  # clips do not fit into memory
            digest.update(block)
    return digest.hexdigest()


def remove_files(paths: Iterable[Path], root: Path) -> int:
    """Remove those files that exist, and folders below `root` that are empty then; return the number of files."""
    found = [path for path in paths if path.is_file() or path.is_symlink()]
    for path in found:
        path.unlink()
        with suppress(OSError):  # not empty
            for folder in path.relative_to(root).parents[:-1]:
                (root / folder).rmdir()
    return len(found)


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name, without a copy where the file system can; `target` is replaced atomically."""
    with atomic_write(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def attempt(write: Callable, *args: object) -> str:
    """Write files that can also be written later; return "", or the reason of a failure, which is also printed."""
    try:
        write(*args)
    except OSError as error:
        reason = f"{error.filename or 'output'}: {error.strerror or error}"
        warn(f"{reason}; the old file is unchanged, the run continues and tries again next time")
        return reason
    return ""


def render_page(template: str, **values: object) -> str:
    """Fill a template, in which values are escaped."""
    import jinja2  # here, because most commands end before a page is written

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return pages.get_template(template).render(**values)


def is_temporary(path: Path) -> bool:
    """Whether a file has a name that this program gives to unfinished files."""
    return re.fullmatch(r"\.cyclegan-[0-9]+-[0-9]+\.tmp", path.name) is not None and path.is_file()


def is_lock(path: Path) -> bool:
    """Whether a path is a file that is empty or holds the number of a process alone, no link and without another name."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return path.stat().st_nlink == 1 and re.fullmatch(rb"[0-9]*\n?", path.read_bytes()) is not None
    except OSError:  # Windows, of a file that is locked
        return True


@contextmanager
def sole_process(folder: Path, *others: Path, remedy: str = "another --run_name") -> Iterator[None]:
    """Lock a folder until the block or this process ends, however it ends, or raise InputError if another holds the lock.

    Child processes do not inherit it. Temporary files that a killed process left there, and in `others`, are removed.
    """
    if rank() > 0:
        yield
        return
    lock = folder / ".lock"
    if os.path.lexists(lock) and not is_lock(lock):
        raise InputError(f"{lock}: needed to keep other processes out, and not of this program; move it away")
    with lock.open("a+", errors="replace") as file:
        try:
            if os.name == "nt":
                file.seek(2**20)  # beyond the number, which others read
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers would keep a flock
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise InputError(f"{folder}: process {file.read(20)} writes there; wait, or choose {remedy}") from None
        except OSError as error:
            warn(f"{folder} cannot be locked ({error.strerror}); do not let a second process write there")
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        left = [folder.glob(".*.tmp"), *(other.rglob(".*.tmp") for other in others)]
        for path in filter(is_temporary, itertools.chain(*left)):
            path.unlink()
        yield


def check_values(value: object) -> None:
    """Raise ValueError for more or longer values than a checkpoint has: a small file can hold copies of copies."""
    waiting = [(value, 0)]
    count = 0
    while waiting:
        x, level = waiting.pop()
        count += 1
        # the largest network has thousands of values, a state six levels
        if count > 10**5 or level > 100 or (isinstance(x, int) and x.bit_length() > 128):
            raise ValueError("it contains more than a checkpoint does")
        inner = [*x.keys(), *x.values()] if isinstance(x, dict) else x
        if isinstance(inner, list | tuple | set):
            waiting += [(y, level + 1) for y in inner]


class SkippedObject(list):
    """Stands for an object of any class in a file of weights; nothing of that class is imported or called."""

    def __init__(self, *_: object, **__: object):
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


class SkippedMapping:
    """The same for classes that derive from dict, which the unpickler fills entry by entry."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return OrderedDict()


def classes_in(path: Path) -> list[str]:
    """Return the classes and functions, other than those of plain tensors and values, that a torch file refers to."""
    with suppress(Exception):  # of the old format, or damaged: torch.load says which
        return sorted(map(one_line, torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    return []


def _load(path: Path, skip_objects: bool) -> object:
    """Call torch.load such that it executes nothing; skip_objects: other classes are replaced by SkippedObject."""
    names = classes_in(path) if skip_objects else []
    if names:
        stand_ins: Any = [(SkippedMapping if name.lower().endswith("dict") else SkippedObject, name) for name in names]
        with suppress(Exception), torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    with torch.serialization.safe_globals([(SkippedMapping, name) for name in names]):  # perhaps another is a mapping
        return torch.load(path, map_location="cpu", weights_only=True)


def read_archive(path: Path, skip_objects: bool = False) -> Any:
    """Read any torch file of plain values and tensors, else raise InputError; nothing in it is executed.

    skip_objects: objects of other classes (Path, Namespace, DictConfig) do not keep the rest from being read
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load would ignore both
                if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:  # torch does not compress
                    raise ValueError("it would unpack to more than its own size")
                damaged = archive.testzip()
                if damaged:
                    raise ValueError(f"damaged: checksum of {damaged} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about the claims of a hostile file
            value = _load(path, skip_objects)
        check_values(value)
    except Exception as error:  # torch and zipfile raise a dozen types on hostile files
        reason = _reason(path, error)
        raise InputError(f"{path}: not a readable checkpoint of plain tensors and values ({reason})") from error
    return value


OTHER_FORMATS = {".onnx": "an ONNX model", ".pb": "a graph of TensorFlow", ".pdparams": "weights of Paddle"}
TENSORFLOW = re.compile(r"\.(index|data-\d+-of-\d+)")  # suffixes of the files of a checkpoint


def _reason(path: Path, error: Exception) -> str:
    """Say what a file that torch.load refuses is, and how its tensors can be saved, or give the first line of an error."""
    if path.suffix.lower() in OTHER_FORMATS:
        return f"{OTHER_FORMATS[path.suffix.lower()]}; expected weights of PyTorch, safetensors or Keras"
    if TENSORFLOW.fullmatch(path.suffix.lower()):
        return 'a checkpoint of TensorFlow; save the network there: generator.save_weights("generator.weights.h5")'
    with suppress(Exception), zipfile.ZipFile(path) as archive:
        names = " ".join(archive.namelist())
        if "/constants.pkl" in names:
            return 'TorchScript; save its tensors: torch.save(torch.jit.load(FILE).state_dict(), "weights.pth")'
        if "/models/model.json" in names or "serialized_exported_program.json" in names:
            return 'a program of torch.export; save its tensors: torch.save(program.state_dict, "weights.pth")'
    with path.open("rb") as file:
        start = file.read(100)
    if re.match(rb"version https://git-lfs|\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
        shown = one_line(start.decode("ascii", "replace").split("\n")[0][:40])
        return f"text that begins with {shown}: a Git LFS pointer or a web page; download the file itself"
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error).strip())
    refused = re.search(r"GLOBAL ([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and (refused or classes_in(path)):
        classes = refused[1] if refused else ", ".join(classes_in(path))[:160]
        return f'objects of {classes} in it; save the tensors alone: torch.save(net.state_dict(), "weights.pth")'
    text = text.rpartition("WeightsUnpickler error: ")[2] or text  # after advice to load the file unsafely
    return one_line(text.split("\n")[0][:120]) or type(error).__name__


def is_state_dict(value: Any) -> bool:
    """Whether a value maps names to ordinary tensors, none larger than its data in the file."""
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(x, Tensor)
        and x.layout == torch.strided
        and not (x.is_quantized or x.is_meta or x.is_nested)
        and x.numel() * x.element_size() <= x.untyped_storage().nbytes()
        for name, x in value.items()
    )


def check_tensors(wanted: dict[str, Tensor], tensors: dict[str, Tensor], what: object) -> None:
    """Raise InputError, with the first three faults, unless a state dict has a network's names, shapes and types."""
    faults = []
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors:
            faults.append(f"{name} is missing, expected {tuple(wanted[name].shape)}")
        elif name not in wanted:
            faults.append(f"{one_line(name)[:80]}, {tuple(tensors[name].shape)}, is not part of this network")
        elif tensors[name].shape != wanted[name].shape:
            faults.append(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}")
        elif tensors[name].is_floating_point() != wanted[name].is_floating_point():
            faults.append(f"{name} is {tensors[name].dtype}, expected {wanted[name].dtype}")
        elif not torch.isfinite(tensors[name].float()).all():  # float: the network's type
            faults.append(f"{name} is not finite")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"{what}: does not fit the network: {'; '.join(faults[:3])}{more}")
