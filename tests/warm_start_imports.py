"""What a training process imports, for the fork server of warm_start.py."""

from nemo_lrpo.actor.platform import ensure_platform

ensure_platform()

import nemo_lrpo.actor.actor  # noqa: E402
import nemo_lrpo.actor.setup  # noqa: E402
import nemo_lrpo.actor.supervised  # noqa: E402
import nemo_lrpo.config.loader  # noqa: E402
import nemo_lrpo.serving.client  # noqa: E402
import nemo_lrpo.train  # noqa: E402
import nemo_lrpo.train_offline  # noqa: E402
import nemo_lrpo.training.offline  # noqa: E402
import nemo_lrpo.training.trainer  # noqa: E402, F401
