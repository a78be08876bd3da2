"""Built-in reward plug-ins, one family a file. Installed as posttrain.rewards."""
