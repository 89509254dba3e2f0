"""What goes into and comes out of a label store as files.

In: comparisons in the formats people have (`comparisons`), or a whole project (`transfer`). Out: what models are
trained on and a table of the labels (`exports`), or the whole project.
"""

from __future__ import annotations

from labeling_ui.comparisons import read_comparisons
from labeling_ui.exports import (
    export_demonstrations,
    export_kto,
    export_labels_csv,
    export_preferences,
    export_rankings,
)
from labeling_ui.transfer import Restored, export_store, import_store

__all__ = [
    "Restored",
    "export_demonstrations",
    "export_kto",
    "export_labels_csv",
    "export_preferences",
    "export_rankings",
    "export_store",
    "import_store",
    "read_comparisons",
]
