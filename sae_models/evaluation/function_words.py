"""English function words: words of grammar, which say nothing of what a text is about."""

TEXT = """
a about above across after again against all along already also although always am among an and another any are
aren around as at be because been before being below between both but by can could couldn d did didn do does doesn
doing don done down during each either else even ever every few for from get gets got had hadn has hasn have
having he hence her here hers herself him himself his how however i if in into is isn it its itself just least
less like little ll m many may me might mine more most much must my myself near neither never no none nor not now
of off often on once one ones only onto or other others ought our ours ourselves out over own per re s same
several shall she should shouldn since so some sometimes still such t than that the their theirs them themselves
then there therefore these they this those though through throughout thus to too toward towards under unless until
up upon us usually ve very via was wasn we were weren what when where whereas whether which while who whom whose
why will with within without won would wouldn yet you your yours yourself yourselves
"""
FUNCTION_WORDS = frozenset(TEXT.split())
