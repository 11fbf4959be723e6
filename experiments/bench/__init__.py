"""How fast kvenv is on this machine, each part beside what it is to be compared with, measured in the same run."""

SECTIONS = ("step", "scale", "rollout", "golden", "ranking", "train")
