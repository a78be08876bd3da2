"""Bundled pipeline YAML. Installed as posttrain.pipelines, so that a wheel carries it."""
