"""Images in the parquet files of Hugging Face data sets: columns of {bytes, path}, or of bytes alone."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from toolkit import images
from utils import InputError, counted, need_package, one_line, warn

MAGIC = {b"\xff\xd8": ".jpg", b"\x89P": ".png"}  # of images whose path says no suffix


def extract_images(paths: Sequence[Path], folder: Path, domain: str, rows: str | None, most_bytes: int) -> None:
    """Write the images of some files into a folder, named by their row; rows without bytes are counted in a warning.

    domain: A or B; of several image columns that one is taken whose name ends with it
    rows:   COLUMN=VALUE, the rows to take, a label by its name or number; None takes all
    raises: InputError for what cannot be read, and for more than most_bytes
    """
    need_package("pyarrow", f"--{domain} {paths[0]}", "pip install -r requirements-parquet.txt")
    import pyarrow.parquet as pq

    number = total = 0
    for path in paths:
        nulls = []  # paths of images without bytes
        try:
            with pq.ParquetFile(path) as file:
                metadata = file.metadata
                total += sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
                if total > most_bytes:
                    raise InputError(f"{path}: claims {total / 2**30:.1f} GiB of images, more than any data set")
                column = image_column(file.schema_arrow, domain, path)
                names = [column, *([rows.partition("=")[0]] if rows else [])]
                wanted = wanted_values(file.schema_arrow, rows, path)
                for batch in file.iter_batches(batch_size=16, columns=names):
                    for row in batch.to_pylist():
                        number += 1
                        if rows is None or str(row[names[1]]) in wanted:
                            write_image(row[column], folder / f"{number:06}", nulls)
        except InputError:
            raise
        except Exception as error:  # pyarrow raises a dozen types on hostile files
            raise InputError(f"{path}: not a readable parquet file ({one_line(error)[:120]})") from error
        if nulls:
            what = f"{counted(len(nulls), 'row')} without the bytes of an image, which has only a path"
            warn(f"{path}: left out {what} (such as {one_line(nulls[0])[:80]}); save it with its images embedded")


def image_column(schema: Any, domain: str, path: Path) -> str:
    """Return the column with the images of a domain: the only one, or the one whose name ends with the domain."""
    import pyarrow as pa

    found = []
    for field in schema:
        is_struct = pa.types.is_struct(field.type) and "bytes" in {
            field.type.field(i).name for i in range(len(field.type))
        }
        if is_struct or pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            found.append(field.name)
    named = [name for name in found if name.endswith(domain)] if len(found) > 1 else found
    if len(named) != 1:
        columns = ", ".join(map(one_line, schema.names))[:120]
        raise InputError(f"{path}: columns {columns}; expected one of images, or one whose name ends with {domain}")
    return named[0]


def wanted_values(schema: Any, rows: str | None, path: Path) -> set[str]:
    """Return the values, as text, of the column in COLUMN=VALUE that are asked for: a label's name stands for its number."""
    if rows is None:
        return set()
    column, _, value = rows.partition("=")
    if column not in schema.names:
        columns = ", ".join(map(one_line, schema.names))[:120]
        raise InputError(f"{path}: no column {column}; expected one of {columns}")
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names") or []
    return {value, *([str(names.index(value))] if value in names else [])}


def write_image(cell: Any, target: Path, nulls: list[str]) -> None:
    """Write the image of a cell, with the suffix of its path or content; note the path of one without bytes."""
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if data is None:
        nulls.append(str(name))
        return
    suffix = PurePosixPath(name or "").suffix.lower()
    suffix = suffix if suffix in images.SUFFIXES else MAGIC.get(data[:2], "")
    target.with_suffix(suffix).write_bytes(data)
