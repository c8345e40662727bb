"""From a checkpoint folder to a converted folder."""
