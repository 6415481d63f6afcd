"""What training and evaluation import, once for all their processes: the fork server of `processes` loads it."""

from nemo_lrpo.actor.platform import ensure_platform

ensure_platform()

import nemo_lrpo.actor.actor  # noqa: E402
import nemo_lrpo.actor.setup  # noqa: E402
import nemo_lrpo.config.loader  # noqa: E402
import nemo_lrpo.evaluate  # noqa: E402
import nemo_lrpo.serving.client  # noqa: E402
import nemo_lrpo.tasks  # noqa: E402
import nemo_lrpo.train  # noqa: E402
import nemo_lrpo.training.trainer  # noqa: E402, F401

# Every process imports the tool itself again, which then finds the large part of that done.
import tools.miniature.page  # noqa: E402, F401
