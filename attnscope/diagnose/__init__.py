"""What went wrong in a run, and which of it is a cause. Reading order: findings (beside this folder), rules/, diagnosis."""

from attnscope.diagnose.diagnosis import RULES, diagnose, findings_json
from attnscope.findings import Evidence, Finding

__all__ = ["RULES", "Evidence", "Finding", "diagnose", "findings_json"]
