"""Files of rows in every container, written by libraries that are not ours."""

import csv
import json

import pyarrow
import pyarrow.parquet


def jsonl(rows):
    """JSON lines as bytes, characters as they are."""
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def write_rows(file, rows):
    """Write rows as the file's suffix says, and return the file."""
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    else:
        file.write_bytes(jsonl(rows))
    return file
