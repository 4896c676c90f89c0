"""Files that survive: atomic writes, pages, a stranger's archive read safely, the lock of a folder.

with atomic_write(path) as temporary:
    temporary.write_bytes(data)
value = read_archive(path)  # of a torch file; nothing in it is executed

Every write goes to a temporary name, is flushed and synced, then renamed: a crash leaves the old file or the new one.
"""

import errno
import functools
import io
import json
import os
import shutil
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit.distributed import first_rank, rank
from utils import InputError, one_line, warn

if os.name == "nt":
    import msvcrt
else:
    import fcntl
if TYPE_CHECKING:
    import jinja2

MOST_VALUES = 10**5  # in a whole-state file; the largest network has thousands
MOST_LEVELS = 100  # of values in values; a state has six
UMASK = threading.Lock()  # to read it is to change it, for all threads


# ---------------------------------------------------------------------------------------------
# Atomic writes


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it replaces `path`, else it is removed."""
    temporary = path.with_name(f".{os.getpid()}-{threading.get_native_id()}.tmp")  # short: long names have a limit
    temporary.unlink(missing_ok=True)  # of a killed process with our number it may be a second name of a good file
    try:
        yield temporary
        with UMASK:
            os.umask(mask := os.umask(0))
        temporary.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        if error.errno:
            error.filename = str(path)  # what the user knows, not the temporary name
            error.filename2 = None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """Rename, so that also after a power cut the target is the old file or the new one."""
    source.replace(target)
    if os.name == "posix":  # the new name is on the disk when its folder is
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def refuse_existing(folder: Path) -> None:
    """Raise InputError if there is such a file or folder."""
    if folder.exists():
        raise InputError(f"{folder}: exists already; move it away, or choose another name where there is a choice")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well it becomes `folder`, else it is removed.

    raises: InputError if `folder` exists
    """
    refuse_existing(folder)
    unfinished = folder.with_name(f".{os.getpid()}.{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process with our number
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@first_rank
def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Write readable JSON; what JSON does not know becomes text (paths), or null (what is no finite number)."""
    plain = json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)
    write_text(path, json.dumps(plain, indent=1) + "\n")


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name without a second copy, where the file system can; `target` is replaced whole."""
    with atomic_write(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def attempt(write: Callable, *args: object) -> str:
    """Call what writes files and can be done later: returns "", or why it failed, which is said in one line."""
    try:
        write(*args)
    except OSError as error:
        reason = f"{error.filename or 'output'}: {error.strerror or error}"
        warn(f"{reason}; what was there stays, the run goes on and tries again next time")
        return reason
    return ""


@functools.cache
def page_templates() -> "jinja2.Environment":
    """The pages in templates/; whatever is put into them is escaped."""
    import jinja2  # here: most calls of a stage end before a page is written

    folder = Path(__file__).parent / "templates"
    loader = jinja2.FileSystemLoader(folder)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)


def write_page(path: Path, template: str, **values: object) -> None:
    """Fill a page of templates/ and write it, whole or not at all."""
    write_text(path, page_templates().get_template(template).render(**values))


# ---------------------------------------------------------------------------------------------
# The lock of a folder


@contextmanager
def sole_process(folder: Path, *others: Path) -> Iterator[None]:
    """Lock a folder until the block or this process ends, whatever ends it; children do not inherit the lock.

    What a killed process left half written there, and in `others`, is removed.
    raises: InputError if another process holds the lock
    """
    if rank() > 0:
        yield
        return
    with (folder / ".lock").open("a+b", buffering=0) as file:
        file.seek(0)
        try:
            if os.name == "nt":
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would live on in forked workers
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                words = "is training there; wait for its end, stop it, or choose another --run_name"
                raise InputError(f"{folder}: {lock_owner(file)} {words}") from None
            warn(f"{folder} cannot be locked ({error.strerror}); start no second run in it")
        with suppress(OSError):
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        for place in (folder, *others):
            for path in place.glob(".*.tmp"):
                path.unlink()
        yield


def lock_owner(file: io.FileIO) -> str:
    """Name the process that wrote its number into a lock; Windows lets nobody else read it."""
    return "another process" if os.name == "nt" else f"process {one_line(file.read(20).decode('latin-1'))}"


# ---------------------------------------------------------------------------------------------
# A stranger's archive


def count_values(value: object) -> int:
    """Count nested plain values; a small file can hold copies of copies that no loop would come to the end of.

    raises: ValueError beyond MOST_VALUES or MOST_LEVELS, and for integers that are too long to be printed
    """
    waiting = [(value, 0)]
    count = 0
    while waiting:
        x, level = waiting.pop()
        count += 1
        if count > MOST_VALUES or level > MOST_LEVELS or (isinstance(x, int) and x.bit_length() > 128):
            raise ValueError("more in it than a checkpoint has")
        inside = [*x.keys(), *x.values()] if isinstance(x, dict) else x
        if isinstance(inside, list | tuple | set):
            waiting += [(y, level + 1) for y in inside]
    return count


def check_zip(path: Path) -> None:
    """Check the sizes and checksums of a torch file, which torch.load does not look at.

    raises: InputError if a checksum is wrong; ValueError if it is compressed, as torch never does
    """
    with zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
            raise ValueError("it would unpack to more than its own size")
        damaged = archive.testzip()
    if damaged:
        raise InputError(f"{path}: damaged (checksum of {damaged} is wrong); use another checkpoint")


def read_archive(path: Path) -> object:
    """Read any torch file as plain values and tensors; nothing in it is executed.

    raises: InputError if it is missing, damaged, or holds more than plain values
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):
            check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's reader, about what a hostile file claims to be
            value = torch.load(path, map_location="cpu", weights_only=True)
        count_values(value)
        return value
    except InputError:
        raise
    except Exception as error:
        reason = one_line(str(error).strip().split("\n")[0][:120]) or type(error).__name__
        raise InputError(f"{path}: not a readable checkpoint of plain tensors and values ({reason})") from error


def is_state_dict(value: Any) -> bool:
    """Whether `value` maps names to ordinary tensors, none larger than what the file holds of it."""
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(x, Tensor)
        and x.layout == torch.strided
        and not (x.is_quantized or x.is_meta or x.is_nested)
        and x.numel() * x.element_size() <= x.untyped_storage().nbytes()
        for name, x in value.items()
    )


def check_tensors(wanted: dict[str, Tensor], tensors: Any, what: object) -> None:
    """Compare a state dict with that of a network before it is loaded, or say in one line what does not fit.

    raises: InputError with the first three names that are missing, foreign, of another shape or type, or not finite
    """
    if not is_state_dict(tensors):
        raise InputError(f"{what}: holds no tensors by name; expected the weights of one network")
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
        elif not torch.isfinite(tensors[name].float()).all():  # as the network will hold it
            faults.append(f"{name} is not finite")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"{what}: does not fit the network: {'; '.join(faults[:3])}{more}")
