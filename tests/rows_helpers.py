# SPDX-License-Identifier: Apache-2.0
"""Files of rows, of the kinds that the job reads."""

import csv
import io
import json


def delimited(rows, delimiter):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(file, rows):
    kind = file.suffix
    if kind == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    elif kind == ".json":
        file.write_text(json.dumps(rows, indent=1))
    elif kind in (".csv", ".tsv"):
        file.write_bytes(delimited(rows, "," if kind == ".csv" else "\t").encode("utf-8-sig"))
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)
