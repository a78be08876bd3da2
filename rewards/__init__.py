"""Built-in reward plug-ins, installed as posttrain.rewards. Each file holds one family of rewards."""
