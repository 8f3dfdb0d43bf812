"""What turns a study file into trials: Optuna decides, Ray Tune runs, MLflow shows."""
