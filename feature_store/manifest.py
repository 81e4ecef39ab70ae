"""The small files beside an array: plan, markers, manifest, seal. Each can tell whether a bit of it has changed."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from feature_store import layout
from feature_store.errors import DamagedFile
from feature_store.schema import Row, text
from feature_store.storage import Bytes, Folder
from feature_store.urls import redacted

if TYPE_CHECKING:  # pyarrow loads only where a table is read or written
    import pyarrow as pa


@dataclass(frozen=True)
class Marker:
    """What is known of a finished shard: for each of its rows the image's size, the sample's crc32c, and its fate."""

    width: list[int]
    height: list[int]
    checksum: list[int]
    quarantine: dict[int, str]
    """Position in the shard to the reason why the image could not be used; its features are NaN (int8: zero)."""
    stamp: list[str] = field(default_factory=list)
    """What tells of each source whether it has changed since: bytes, and modification time or ETag. May be absent."""


def plan_bytes(rows: Sequence[Row]) -> bytes:
    """The plan as Parquet: sample_id, view, source, in row order."""
    return _parquet(_plan_table(rows))


def manifest_bytes(rows: Sequence[Row], markers: Sequence[Marker]) -> bytes:
    """The manifest: the plan, and from the markers each row's size, crc32c, stamp and quarantine (null: none)."""
    import pyarrow as pa

    table = _plan_table(rows)
    for name, kind in (("width", pa.int32()), ("height", pa.int32()), ("checksum", pa.uint32())):
        table = table.append_column(name, pa.array([v for m in markers for v in getattr(m, name)], kind))
    stamps = [stamp for m in markers for stamp in (m.stamp or [""] * len(m.width))]
    table = table.append_column("stamp", pa.array(stamps, pa.string()))
    reasons = [m.quarantine.get(slot) for m in markers for slot in range(len(m.width))]
    return _parquet(table.append_column("quarantine", pa.array(reasons, pa.string())))


def read_table(data: Bytes) -> "pa.Table":
    """A plan or a manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)


def rows_of(table: "pa.Table") -> list[Row]:
    """The rows of a plan or manifest."""
    columns = (table["sample_id"].to_pylist(), table["view"].to_pylist(), table["source"].to_pylist())
    return [Row(*values) for values in zip(*columns, strict=True)]


def marker_bytes(shard: int, marker: Marker) -> bytes:
    """A marker as JSON with its own crc32c."""
    record = {
        "shard": shard,
        "width": marker.width,
        "height": marker.height,
        "checksum": marker.checksum,
        "quarantine": {str(slot): reason for slot, reason in marker.quarantine.items()},
        "stamp": marker.stamp,
    }
    return _json(record | {"crc32c": layout.crc32c(_json(record))})


def read_marker(data: Bytes, shard: int) -> Marker | None:
    """The marker of a shard, None if it is damaged or another shard's."""
    try:
        record = json.loads(bytes(data))
        crc = record.pop("crc32c")
        if _json(record | {"crc32c": crc}) != bytes(data) or layout.crc32c(_json(record)) != crc:
            return None
        if record["shard"] != shard:
            return None
        quarantine = {int(slot): reason for slot, reason in record["quarantine"].items()}
        return Marker(record["width"], record["height"], record["checksum"], quarantine, record.get("stamp", []))
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def seal_bytes(files: dict[str, Bytes]) -> bytes:
    """The seal: the crc32c of each file that a reader relies on, and of this list."""
    vouched = {name: layout.crc32c(data) for name, data in files.items()}
    return _json({"crc32c": vouched, "own_crc32c": layout.crc32c(_json(vouched))})


def read_sealed(folder: Folder, names: Sequence[str]) -> dict[str, Bytes]:
    """The seal and files that it vouches for. Raises FileNotFoundError without a seal, DamagedFile on damage."""
    raw = bytes(folder.read(layout.SEAL))
    try:
        record: dict[str, Any] = json.loads(raw)
        vouched = record["crc32c"]
        whole = _json(record) == raw and layout.crc32c(_json(vouched)) == record["own_crc32c"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamagedFile(folder.url, layout.SEAL)
    contents: dict[str, Bytes] = {layout.SEAL: raw}
    for name in names:
        try:
            contents[name] = folder.read(name)
        except FileNotFoundError:
            raise DamagedFile(folder.url, name) from None
        if layout.crc32c(contents[name]) != vouched[name]:
            raise DamagedFile(folder.url, name)
    return contents


def _plan_table(rows: Sequence[Row]) -> "pa.Table":
    import pyarrow as pa

    return pa.table(
        {
            "sample_id": pa.array([text(r.sample_id) for r in rows], pa.string()),
            "view": pa.array([r.view for r in rows], pa.int32()),
            "source": pa.array([text(redacted(r.source)) for r in rows], pa.string()),
        }
    )


def _json(record: Any) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def _parquet(table: "pa.Table") -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
