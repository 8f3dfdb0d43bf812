"""Home of what reads MLflow and the ledger; of this project it may import `studies.machinery.records` alone."""
