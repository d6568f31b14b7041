"""What went wrong in a run, and which of it is a cause. Reading order: finding, rules, causes, symptoms, by_member."""

from attnscope.diagnose.finding import Evidence, Finding
from attnscope.diagnose.rules import RULES, diagnose, findings_json

__all__ = ["RULES", "Evidence", "Finding", "diagnose", "findings_json"]
