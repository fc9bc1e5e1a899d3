"""Parts of reinforcement learning: rollouts, experience, objectives and the critic.

`lightning_lm.modules` exports them; `lightning_lm.modules.rl.policy` is the place to begin reading.
"""

__all__: list[str] = []
