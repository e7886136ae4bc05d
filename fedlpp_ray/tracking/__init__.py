"""What a person sees of a run: MLflow, metrics by name, progress.

`fedlpp_ray.tracking.mlflow_runs` is imported where it is needed: importing MLflow takes seconds.
"""
