"""The data report: what preparation did to the rows, what is in those that are left, and what to look at.

told = describe(config, counts, {"preferences": folder / "preferences.jsonl"}, tokenizer)
write(folder, told)          # data_report.json for machines, data_report.html for people
for line in sentences(told): print(line)
"""

from align.data.report.describe import describe
from align.data.report.schema import Told
from align.data.report.writing import sentences, write

__all__ = ["Told", "describe", "sentences", "write"]
