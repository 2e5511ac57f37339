"""Coupled channels: which weight axes belong together, and the one verb that edits them."""

from structopt.channels.analysis import channel_groups
from structopt.channels.explain import Explanation, explain
from structopt.channels.groups import Channels
from structopt.channels.members import ChannelGroup, Member
from structopt.channels.taking import take

__all__ = ["ChannelGroup", "Channels", "Explanation", "Member", "channel_groups", "explain", "take"]
