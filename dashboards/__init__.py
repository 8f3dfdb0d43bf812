"""Tables and figures of what MLflow was told; of the machinery they know the names and the intervals."""


class DashboardError(ValueError):
    """Something was asked for that is not there. The message names the rule, the value and the way out."""
