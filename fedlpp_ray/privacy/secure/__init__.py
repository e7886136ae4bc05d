"""Secure aggregation: the server learns the sum of the clients' vectors and no single vector.

The protocol of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine
Learning" (CCS 2017), section 4, in the honest-but-curious model. Each client adds to its vector of
integers mod 2^bits a mask of its own and, with every other client, a mask that one adds and the
other subtracts. Both secrets of a client are shared (Shamir, threshold t of n):

    keys    -> roster     public keys for masks and for encryption; a commitment to the own mask
    shares  -> inbox      shares of both secrets, encrypted for each client
    masked  -> survivors  y_u = x_u + m_u + sum over v > u of p_uv - sum over v < u of p_uv
    unmask                per client one share: of m_u if y_u came, else of the key of its p_uv

`SecureClient` and `SecureServer` are the two halves; messages between them are bytes. With these
masks the sum of the y_u that came, less what the shares open, is the sum of their x_u mod 2^bits,
whatever the keys are: `Grid` chooses the resolution so that it is also the sum over the integers.

Protected: the vectors of clients (with them the weights), each of them beyond what the sum and the
other parties' own vectors tell, against

- a server that follows the protocol and keeps all that it sees, alone or with fewer than t clients
  that pool with it all that they know;
- any number of clients without the server, and whoever reads the wire.

With fewer than t clients left at any step the sum stays masked, and everybody stops.

Not protected:

- The sum itself. It tells of t clients at least; n - 1 colluding clients know the last one's.
- Against a server that departs from the protocol. Public keys are believed as the server passes
  them on, so it could take a client's place; that needs keys certified beforehand. The signed
  round in which clients compare what they were told of the survivors is not included. In its place
  a client answers one `survivors` only, and t > n/2: a server that passes keys on truthfully but
  tells clients of different survivors still gets both secrets of a client only if the c clients
  that collude with it make n + c >= 2 t.
- The sum's correctness against a client that sends a wrong vector, and messages against somebody
  who rewrites them on their way to the server: digests find damage, not forgery. The transport
  must authenticate clients (TLS). Shares are encrypted and authenticated between clients.
"""

from fedlpp_ray.privacy.secure.client import SecureClient
from fedlpp_ray.privacy.secure.fixed_point import Grid, length_of
from fedlpp_ray.privacy.secure.primitives import RandomBytes, check_installed
from fedlpp_ray.privacy.secure.protocol import Outcome, run, traffic
from fedlpp_ray.privacy.secure.server import SecureServer
from fedlpp_ray.privacy.secure.session import STEPS, Session, Step, TooFewClientsError

__all__ = [
    "STEPS",
    "Grid",
    "Outcome",
    "RandomBytes",
    "SecureClient",
    "SecureServer",
    "Session",
    "Step",
    "TooFewClientsError",
    "check_installed",
    "length_of",
    "run",
    "traffic",
]
