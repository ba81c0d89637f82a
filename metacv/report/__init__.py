from metacv.report.gather import report

__all__ = ["report"]
