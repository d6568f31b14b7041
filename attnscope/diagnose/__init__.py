"""What went wrong in a run, and which of it is a cause.

Reading order: findings (beside this folder), blindness, rules/, diagnosis, pages.
"""

from attnscope.diagnose.diagnosis import RULES, Diagnosis, diagnose, examine, findings_json
from attnscope.findings import Evidence, Finding, NotLooked

__all__ = ["RULES", "Diagnosis", "Evidence", "Finding", "NotLooked", "diagnose", "examine", "findings_json"]
