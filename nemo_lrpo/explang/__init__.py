"""ExpLang: the policy chooses its thinking language. Format, rewards, stages and metrics as pure functions; training by
them is nemo_lrpo/training/modes.py, scoring nemo_lrpo/rewards/scorer.py."""
