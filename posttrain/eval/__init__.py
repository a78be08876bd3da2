"""Pass rates of a policy on problems it was never trained on."""
