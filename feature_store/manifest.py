"""The Parquet tables beside an array: the plan (which rows there will be) and the manifest (what each row holds)."""

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.schema import Row


def plan_bytes(rows: Sequence[Row]) -> bytes:
    """The plan as Parquet: sample_id, view, source, in row order."""
    return _parquet(_plan_table(rows))


def manifest_bytes(rows: Sequence[Row], markers: Sequence[dict]) -> bytes:
    """The manifest: the plan, and for each row its image's size and the crc32c of its bytes, from the markers."""
    table = _plan_table(rows)
    for name, kind in (("width", pa.int32()), ("height", pa.int32()), ("checksum", pa.uint32())):
        table = table.append_column(name, pa.array([v for marker in markers for v in marker[name]], kind))
    return _parquet(table)


def read_table(data: bytes) -> pa.Table:
    """A plan or a manifest."""
    return pq.read_table(io.BytesIO(data))


def rows_of(table: pa.Table) -> list[Row]:
    """The rows of a plan or manifest."""
    columns = (table["sample_id"].to_pylist(), table["view"].to_pylist(), table["source"].to_pylist())
    return [Row(*values) for values in zip(*columns, strict=True)]


def _plan_table(rows: Sequence[Row]) -> pa.Table:
    return pa.table(
        {
            "sample_id": pa.array([r.sample_id for r in rows], pa.string()),
            "view": pa.array([r.view for r in rows], pa.int32()),
            "source": pa.array([r.source for r in rows], pa.string()),
        }
    )


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
