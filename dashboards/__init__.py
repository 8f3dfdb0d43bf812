"""Tables and figures of what MLflow was told; of this project they may import `studies.machinery.records` alone."""


class DashboardError(ValueError):
    """Something was asked for that is not there. The message names the rule, the value and the way out."""
