"""Print the table: `python -m tests.conformance`."""

from tests.conformance import table

print(table.markdown(table.table()))
