"""Bundled stage, model and hardware YAML that pipelines include. Installed as posttrain.configs."""
