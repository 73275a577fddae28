"""Coded errors: every refusal says what happened, why, and what to do.

A code never changes its meaning. `docs/errors.md` has one line per code, and a test keeps the two in
step. Only the code ever crosses the wire; `detail` stays on the machine that raised the error.
"""

from __future__ import annotations

from typing import ClassVar, Final

EXIT_STATUSES: Final = {
    0: "It did what was asked. An audit: PASS.",
    1: "An error that has no status of its own. An audit: FAIL.",
    2: "The command line, a plan or a policy is not valid. An audit: INCONCLUSIVE.",
    3: "A budget, a policy, a ledger or a log of acts does not allow to go on.",
    4: "A message, a frame or the encryption library is not as it must be.",
    5: "A certificate, a secret or a home is refused.",
    6: "Data, a model or training is refused.",
    7: "Somebody is not there or busy, for now; trying again can help.",
    8: "The installed Flower is another one.",
    9: "A package, a report or findings do not verify, or could not be made.",
    10: "This machine is not ready for what was asked.",
    11: "The run is paused or was interrupted; --resume goes on with it.",
    12: "The run has failed for good.",
    13: "A disk, a database or the output is in the way.",
    130: "Interrupted by Ctrl-C or a signal.",
    141: "The reader of the output has gone.",
}
"""What an exit status of the command line means; an error's class has one of them."""


class FedsealError(Exception):
    """Base of all errors that fedseal raises on purpose.

    Attributes:
        code: Stable identifier, for example ``FS-BUDGET-01``.
        what: One sentence that says what happened.
        remedy: One sentence that says what to do about it.
        exit_code: Exit status of the command line when the error ends it.
        detail: What is particular to this occurrence: a field name, a limit. Never private data.
    """

    code: ClassVar[str] = "FS-GENERAL-01"
    what: ClassVar[str] = "fedseal refused to go on."
    remedy: ClassVar[str] = "Read the detail and correct the input."
    exit_code: ClassVar[int] = 1

    def __init__(self, detail: str = "") -> None:
        self.detail = detail
        super().__init__(f"{self.code}: {self.what} {detail}".rstrip())

    def explain(self) -> str:
        """Return the message for a person: code, what, detail and remedy on separate lines."""
        lines = [f"{self.code}  {self.what}"]
        if self.detail:
            lines.append(f"  why: {self.detail}")
        lines.append(f"  do:  {self.remedy}")
        return "\n".join(lines)


class Unexpected(FedsealError):
    """Something happened that no part of fedseal expected."""

    code = "FS-GENERAL-02"
    what = "fedseal met an error that it did not expect."
    remedy = (
        "Repeat it with fedseal --debug or FEDSEAL_DEBUG=1, on this machine only, and report where it was."
    )
    exit_code = 1


class OutputLost(FedsealError):
    """Standard output cannot be written."""

    code = "FS-CLI-01"
    what = "The output could not be written."
    remedy = "Free space where standard output goes, or send it elsewhere, and repeat the command."
    exit_code = 13


class NameUnknown(FedsealError):
    """A name on the command line is that of nothing that exists."""

    code = "FS-CLI-02"
    what = "Nothing has this name."
    remedy = "Give one of the names that the detail lists, or the beginning of just one of them."
    exit_code = 2


class NameAmbiguous(FedsealError):
    """The beginning of a name on the command line is that of several names."""

    code = "FS-CLI-03"
    what = "More than one thing has a name that begins like this."
    remedy = "Give more characters of the one that is meant, of those that the detail lists."
    exit_code = 2


class DiskFull(FedsealError):
    """A disk, a quota or a limit has no room for what must be written."""

    code = "FS-DISK-01"
    what = "There is no space left on a disk."
    remedy = "Free space there and repeat the command; what was stored before is intact, restore no backup."
    exit_code = 13


class AccessDenied(FedsealError):
    """The system does not let this user read or write a file, or the disk is read-only."""

    code = "FS-DISK-02"
    what = "A file or folder may not be read or written by this user."
    remedy = "Correct its owner, mode or mount, and repeat; what was stored is intact, restore no backup."
    exit_code = 13


class DiskFailed(FedsealError):
    """A disk answers with an error of its own."""

    code = "FS-DISK-03"
    what = "A disk failed while it was read or written."
    remedy = "Stop using the disk and look at the system's log; copy what can be read before anything else."
    exit_code = 13


class StorageBusy(FedsealError):
    """Another process holds a lock that does not become free in time."""

    code = "FS-DISK-04"
    what = "Another process holds a stored file."
    remedy = "Wait for the other process or end it, and repeat the command; nothing is damaged."
    exit_code = 13


class FileDamaged(FedsealError):
    """A stored file is not one that fedseal wrote, or not as it wrote it."""

    code = "FS-DISK-05"
    what = "A stored file is damaged."
    remedy = "Keep a copy of it; docs/operations.md says for each kind of file what may take its place."
    exit_code = 13


class FileUnusable(FedsealError):
    """A file or folder is missing, or something else has its name."""

    code = "FS-DISK-06"
    what = "A file or folder is missing, or is not what it must be."
    remedy = "Correct the path, or put there what the detail names."
    exit_code = 13


class ResourcesShort(FedsealError):
    """The system has no memory or no file handles left for this process."""

    code = "FS-DISK-07"
    what = "The system has too little memory or too many open files."
    remedy = "End other programs or raise the limit (ulimit -n), and repeat; what was stored is intact."
    exit_code = 13


class PlanInvalid(FedsealError):
    """A plan has an unknown key, a wrong type or an impossible value."""

    code = "FS-PLAN-01"
    what = "The plan is not valid."
    remedy = "Correct the named field; docs/plan.md describes every field."
    exit_code = 2


class CapacityExceeded(FedsealError):
    """The encryption preset cannot hold the sum of this cohort."""

    code = "FS-PLAN-02"
    what = "The encryption preset cannot hold an exact sum for this cohort."
    remedy = "Lower cohort.maximum or choose a preset for larger cohorts."
    exit_code = 2


class NoiseTooSmall(FedsealError):
    """The noise multiplier does not reach the privacy target."""

    code = "FS-PLAN-03"
    what = "privacy.noise_multiplier is too small for privacy.target_epsilon."
    remedy = "Leave privacy.noise_multiplier out to have it calibrated, or raise target_epsilon."
    exit_code = 2


class PolicyInvalid(FedsealError):
    """An owner's policy file has an unknown key, a wrong type or an impossible value."""

    code = "FS-POLICY-01"
    what = "The policy is not valid."
    remedy = "Correct the named field; docs/policy.md describes every field."
    exit_code = 2


class PolicyRefused(FedsealError):
    """A plan asks for more than the owner's policy allows."""

    code = "FS-POLICY-02"
    what = "The plan is outside this owner's policy."
    remedy = "Change the plan, or have the owner change the named policy field."
    exit_code = 3


class PolicyChanged(PolicyRefused):
    """An owner changed its policy during a run, and it does not allow the run any more."""

    code = "FS-POLICY-03"
    what = "This owner's policy changed and does not allow the run any more."
    remedy = "The owner left the run; to come back, allow the plan again and start the node anew."
    exit_code = 3


class BudgetExhausted(FedsealError):
    """The next release would exceed a privacy cap of this owner."""

    code = "FS-BUDGET-01"
    what = "The privacy budget of this dataset does not cover the next release."
    remedy = "Stop using this dataset, or have its owner raise the cap in policy.toml."
    exit_code = 3


class LedgerCorrupt(FedsealError):
    """The hash chain of the privacy ledger does not verify."""

    code = "FS-LEDGER-01"
    what = "The privacy ledger was changed or damaged."
    remedy = (
        "Keep its files, restore the newest backup, and declare what that lacks with fedseal ledger adopt; "
        "never start an empty one."
    )
    exit_code = 3


class LedgerRollback(FedsealError):
    """The privacy ledger is older than a head that is known elsewhere."""

    code = "FS-LEDGER-02"
    what = "The privacy ledger is older than its last known head."
    remedy = "Restore the newest ledger; if it is lost, declare its cost with fedseal ledger adopt."
    exit_code = 3


class LedgerConflict(FedsealError):
    """A ledger operation does not follow the order reserve, then commit or void."""

    code = "FS-LEDGER-03"
    what = "The privacy ledger refused an operation that does not follow its order."
    remedy = "Report this with the ledger's record list; it points to a fault in the caller."
    exit_code = 3


class DatasetRenamed(LedgerConflict):
    """A policy names another dataset than the one whose budget the home's ledger keeps."""

    code = "FS-POLICY-04"
    what = "policy.toml names another dataset than the ledger of this home."
    remedy = "Put the old name back; data about other people needs a home and a ledger of its own."
    exit_code = 3


class EncodingInvalid(FedsealError):
    """Bytes of a peer are not the canonical encoding of the expected message."""

    code = "FS-WIRE-01"
    what = "A message is not in canonical form."
    remedy = "Make sure that all parties run the same fedseal version; else treat the peer as hostile."
    exit_code = 4


class SignatureInvalid(FedsealError):
    """A signature does not verify, or its signer is not who it should be."""

    code = "FS-WIRE-02"
    what = "A signature does not verify."
    remedy = "Treat the message as forged; check the peer's certificate and the coordinator."
    exit_code = 4


class ProtocolViolation(FedsealError):
    """A message is well-formed but not allowed at this point of the protocol."""

    code = "FS-WIRE-03"
    what = "A message is not allowed at this point of the protocol."
    remedy = "Check that the coordinator and all owners run the same version and the same run."
    exit_code = 4


class RosterRefused(FedsealError):
    """A roster or a round's list does not satisfy this owner's conditions."""

    code = "FS-ROSTER-01"
    what = "The list of owners does not satisfy this owner's conditions."
    remedy = "Check cohort.minimum, the pinned peers and min_known_peers in policy.toml."
    exit_code = 4


class SessionMismatch(FedsealError):
    """A message belongs to another session or another run."""

    code = "FS-ROSTER-02"
    what = "A message belongs to another session."
    remedy = "Let the coordinator start a fresh join; a message of another session is never accepted."
    exit_code = 4


class AttemptRefused(FedsealError):
    """An attempt number or a repeated request is not acceptable."""

    code = "FS-ROUND-01"
    what = "This attempt was already used or is out of order."
    remedy = "The coordinator must use a higher attempt number; nothing is ever sealed or opened twice."
    exit_code = 4


class ModelMismatch(FedsealError):
    """The model that the coordinator names is not the one this owner computed."""

    code = "FS-ROUND-02"
    what = "The coordinator's model is not the one that follows from the signed openings."
    remedy = "Check that all parties run the same fedseal version; else treat the coordinator as hostile."
    exit_code = 4


class OpeningRefused(FedsealError):
    """An encrypted sum did not open to what it must."""

    code = "FS-ROUND-03"
    what = "The encrypted sum does not open to the announced contributors."
    remedy = "The round is void; the coordinator starts a new attempt without the owner at fault."
    exit_code = 4


class FrameInvalid(FedsealError):
    """A ciphertext frame has a wrong length, digest or residue."""

    code = "FS-FRAME-01"
    what = "A ciphertext frame is malformed."
    remedy = "The sender's update is dropped; check its version and its network."
    exit_code = 4


class EncryptionUnavailable(FedsealError):
    """The homomorphic encryption library does not behave as measured."""

    code = "FS-FRAME-02"
    what = "The encryption library failed its self-test."
    remedy = (
        "Install the pinned TenSEAL; or plan encryption.frames = 'seal', which each policy must allow by "
        "plans.allow_seal_frames."
    )
    exit_code = 4


class CertificateRefused(FedsealError):
    """A certificate is missing, foreign, expired, revoked or for another use."""

    code = "FS-CERT-01"
    what = "A certificate was refused."
    remedy = (
        "Check its issuer, its dates and its state with fedseal pki list; renew or sign anew if needed."
    )
    exit_code = 5


class MemberUncertified(FedsealError):
    """Another owner's certificate is not valid, as this owner knows."""

    code = "FS-CERT-03"
    what = "Another owner's certificate is not valid."
    remedy = (
        "Give the coordinator the newest revocation list (fedseal home crl); the run goes on without that "
        "owner."
    )
    exit_code = 5


class OwnCertificateExpired(CertificateRefused):
    """A party's own certificate is not valid at this time."""

    code = "FS-CERT-04"
    what = "This party's own certificate has expired or is not valid yet."
    remedy = "Check this machine's clock; then have the request signed again, and install the answer."
    exit_code = 5


class OwnCertificateRevoked(CertificateRefused):
    """A party's own certificate is on the authority's revocation list."""

    code = "FS-CERT-05"
    what = "This party's own certificate is revoked."
    remedy = "Ask the authority why; it takes new keys and a new certificate to come back."
    exit_code = 5


class SecretUnavailable(FedsealError):
    """A secret cannot be decrypted, or its file is readable by others."""

    code = "FS-CERT-02"
    what = "A secret could not be opened."
    remedy = "Give the right passphrase, and keep secret files at mode 0600."
    exit_code = 5


class PassphraseTooShort(SecretUnavailable):
    """A passphrase for a new key is too easily guessed."""

    code = "FS-CERT-06"
    what = "A new passphrase is too short."
    remedy = "Choose at least 15 characters, for example five random words; keys that exist keep theirs."
    exit_code = 5


class DataInvalid(FedsealError):
    """An owner's data file does not fit the task."""

    code = "FS-DATA-01"
    what = "The data file does not fit the task."
    remedy = "Compare the file with the reader's description in docs/tasks.md."
    exit_code = 6


class DataUnavailable(DataInvalid):
    """An owner's data file is missing, or cannot be opened as a file."""

    code = "FS-DATA-03"
    what = "The data file is missing or cannot be opened."
    remedy = "Put the file back or correct data_file in policy.toml; withdrawn data needs nothing more."
    exit_code = 6


class ModelUnsafe(FedsealError):
    """A model cannot be trained with a per-example privacy guarantee."""

    code = "FS-MODEL-01"
    what = "This model cannot be trained with a per-example privacy guarantee."
    remedy = "Replace layers that mix examples of a batch, for example BatchNorm by GroupNorm."
    exit_code = 6


class TrainingFailed(FedsealError):
    """Local training stopped; the reason stays on the owner's machine."""

    code = "FS-TRAIN-01"
    what = "Local training stopped."
    remedy = "Look at the owner's own log; nothing about the cause leaves its machine."
    exit_code = 6


class QuorumNotMet(FedsealError):
    """Too few owners answered for the run to go on."""

    code = "FS-RUN-01"
    what = "Too few owners answered in time."
    remedy = "Start the missing owners and resume; what was finished is kept."
    exit_code = 7


class RunFailed(FedsealError):
    """The run ended before its last round."""

    code = "FS-RUN-02"
    what = "The run ended before its last round."
    remedy = "Read the report of the run and the owners' own logs, mend the cause and start a new run."
    exit_code = 12


class ModelRanAway(RunFailed):
    """A round's model is not finite, or one of its weights is beyond the bound of all plans."""

    code = "FS-RUN-08"
    what = "The model ran away: a weight is not finite or is larger than 10,000."
    remedy = "Start a new run with smaller learning rates (training, server_optimizer); this one is over."
    exit_code = 12


class ServerUnavailable(FedsealError):
    """The coordinator does not answer or refuses the connection."""

    code = "FS-RUN-03"
    what = "The coordinator cannot be reached."
    remedy = "Start fedseal server, and check address, port and certificates with fedseal doctor."
    exit_code = 7


class AddressMalformed(FedsealError):
    """A coordinator's address is not a host and a port."""

    code = "FS-NET-01"
    what = "The coordinator's address is not of the form HOST:PORT."
    remedy = "Give a name or an IP address and a port, such as fl.example.org:8443 or [2001:db8::1]:8443."
    exit_code = 2


class HostUnknown(ServerUnavailable):
    """No address is known for a coordinator's name."""

    code = "FS-NET-02"
    what = "No address is known for the coordinator's name."
    remedy = "Check the name, and this machine's name service (DNS) with getent hosts NAME."
    exit_code = 7


class PortRefused(ServerUnavailable):
    """A coordinator's machine answers that nothing listens at a port."""

    code = "FS-NET-03"
    what = "Nothing listens at the coordinator's address."
    remedy = "Ask its operator whether fedseal server runs, at which port and on which --host."
    exit_code = 7


class NoAnswer(ServerUnavailable):
    """A coordinator's address is silent, or no way leads there."""

    code = "FS-NET-04"
    what = "The coordinator's address does not answer."
    remedy = "Check the address, and whether a firewall on the way drops what goes to that port."
    exit_code = 7


class NotACoordinator(ServerUnavailable):
    """What answers at a coordinator's address does not speak its protocol."""

    code = "FS-NET-05"
    what = "What answers at the coordinator's address does not speak TLS 1.3 as a coordinator does."
    remedy = "Check the port; a proxy or a load balancer before the coordinator must pass TLS on as it is."
    exit_code = 7


class CoordinatorForeign(ServerUnavailable):
    """A coordinator's certificate is not of the authority that its peer trusts, or not a coordinator's."""

    code = "FS-NET-06"
    what = "The coordinator's certificate is not one of this federation's authority."
    remedy = "Check the address; compare ca.crt with the coordinator's. Something on the way may open TLS."
    exit_code = 7


class CoordinatorMisnamed(ServerUnavailable):
    """A coordinator's certificate does not name the host that was connected to."""

    code = "FS-NET-07"
    what = "The coordinator's certificate is not for this name."
    remedy = "Use a name that is in it, or have it made anew with pki request coordinator --host NAME."
    exit_code = 7


class CoordinatorExpired(ServerUnavailable):
    """A coordinator's certificate is not valid at this time, or is revoked."""

    code = "FS-NET-08"
    what = "The coordinator's certificate has expired, is not valid yet, or is revoked."
    remedy = "Check this machine's clock; then tell the operator, who needs a new certificate."
    exit_code = 7


class NotAMember(ServerUnavailable):
    """An owner with a certificate of the authority is not registered at a coordinator."""

    code = "FS-NET-09"
    what = "The coordinator does not have this owner among its members."
    remedy = "Have the operator put this owner's transport certificate into members/ of the coordinator."
    exit_code = 7


class ClocksDiffer(ServerUnavailable):
    """The clocks of two parties differ by more than signed requests allow."""

    code = "FS-NET-10"
    what = "The clocks of this machine and its peer differ by more than is tolerated."
    remedy = "Set both clocks, best by a time service (NTP); five minutes are tolerated."
    exit_code = 7


class ProxyFailed(ServerUnavailable):
    """A proxy cannot be reached, or does not connect to a coordinator."""

    code = "FS-NET-11"
    what = "The proxy does not connect this node to the coordinator."
    remedy = "Check the proxy's address and login, and whether it may connect to the coordinator's port."
    exit_code = 7


class ProxyUnusable(FedsealError):
    """A proxy is named in a form that is not supported or not safe."""

    code = "FS-NET-12"
    what = "This proxy cannot be used."
    remedy = "Give http://HOST:PORT of a proxy that supports CONNECT; a login goes into FEDSEAL_PROXY."
    exit_code = 2


class FlowerChanged(FedsealError):
    """The installed Flower version does not have what fedseal builds on."""

    code = "FS-FLOWER-01"
    what = "The installed Flower does not have the internals that fedseal builds on."
    remedy = "Install the pinned flwr version of constraints.txt."
    exit_code = 8


class PackageInvalid(FedsealError):
    """A model package is incomplete, changed or not signed by the expected key."""

    code = "FS-PACKAGE-01"
    what = "The model package does not verify."
    remedy = "Do not load it; get a fresh copy and the signer's public key from its owner."
    exit_code = 9


class CompressionRefused(FedsealError):
    """A compression step would break a promise."""

    code = "FS-PACKAGE-02"
    what = "A compression step was refused."
    remedy = "Lower compression.prune_ratio or raise compression.max_accuracy_drop."
    exit_code = 9


class PackageImpossible(CompressionRefused):
    """The plan's model cannot be packaged with the plan's settings, trained or not."""

    code = "FS-PACKAGE-04"
    what = "This plan's model cannot be packaged with the plan's compression settings."
    remedy = "Choose another prune_ratio, quantize or model in the plan; nothing was trained or charged."
    exit_code = 9


class ModelNotFinite(CompressionRefused):
    """A model to be packaged has weights or answers that are not finite."""

    code = "FS-PACKAGE-05"
    what = "The model is not finite and cannot be packaged."
    remedy = "Start a new run with smaller learning rates; no setting of compression mends this model."
    exit_code = 9


class ReportInvalid(FedsealError):
    """An audit report does not fit its schema or its signature."""

    code = "FS-AUDIT-01"
    what = "The audit report does not verify."
    remedy = "Do not rely on it; ask the coordinator for the original report."
    exit_code = 9


class EnvironmentUnfit(FedsealError):
    """The machine lacks something that fedseal needs."""

    code = "FS-DOCTOR-01"
    what = "This machine is not ready."
    remedy = "Follow the hints that fedseal doctor prints."
    exit_code = 10


class PackageNotWritten(FedsealError):
    """A model package was not written because it would replace another or contradict its plan."""

    code = "FS-PACKAGE-03"
    what = "The model package was not written."
    remedy = "Correct what the detail names; move an older package of the same name away first."
    exit_code = 9


class HomeExists(FedsealError):
    """A home folder that is to be made is there already."""

    code = "FS-HOME-01"
    what = "The home folder exists already."
    remedy = "Choose a new folder; an existing home may hold a ledger that must not be lost."
    exit_code = 5


class HomeBusy(FedsealError):
    """A second node or coordinator was started on one home, or the home cannot be locked."""

    code = "FS-HOME-02"
    what = "This process cannot have the home for itself."
    remedy = "Stop the node or coordinator that runs on it, or make it a folder that this user may read."
    exit_code = 5


class HomeMissing(FedsealError):
    """There is no home folder where one is named."""

    code = "FS-HOME-03"
    what = "There is no home folder at this place."
    remedy = "Correct --home; fedseal pki request, pki install and fedseal home make a new one."
    exit_code = 5


class HomeOfAnother(FedsealError):
    """A folder is not the home of the party that the command is for."""

    code = "FS-HOME-04"
    what = "This folder is not the home that the command needs."
    remedy = "Give the home of the party that the detail names; an unfinished one needs fedseal home."
    exit_code = 5


class AddressUnavailable(FedsealError):
    """The coordinator cannot accept connections at the address that it was given."""

    code = "FS-SERVER-01"
    what = "The coordinator cannot listen at this address."
    remedy = "Choose an address of this machine with --host and a free port with --port, or free that port."
    exit_code = 10


class InsideUnreachable(FedsealError):
    """A coordinator cannot reach its own listener for runs."""

    code = "FS-SERVER-02"
    what = "The coordinator cannot connect to its own listener on 127.0.0.1, so that no run would begin."
    remedy = "Look for a packet filter or a security module that stops connections to 127.0.0.1."
    exit_code = 10


class ListStale(CertificateRefused):
    """A coordinator's revocation list is not fresh, so that it would let nobody in."""

    code = "FS-SERVER-03"
    what = "The coordinator's revocation list is not valid now; it would let nobody in."
    remedy = "Ask the authority for a new crl.pem and take it with fedseal home crl."
    exit_code = 10


class PeerUnusable(FedsealError):
    """Another project's program, with which a benchmark compares, cannot be run."""

    code = "FS-BENCH-01"
    what = "A program that the benchmark compares with cannot be run."
    remedy = "Name an environment with the packages of docs/benchmarks.md by --peers, or leave it out."
    exit_code = 10


class BenchmarkFailed(FedsealError):
    """A benchmark has impossible settings, or an arm of it ended early."""

    code = "FS-BENCH-02"
    what = "The benchmark could not be run."
    remedy = "Correct what the detail names; an arm that ended may need more memory or fewer parameters."
    exit_code = 10


class BenchmarkWorse(FedsealError):
    """A ratio of a benchmark is worse than in an earlier file, by more than is tolerated."""

    code = "FS-BENCH-03"
    what = "The benchmark is worse than the earlier one by more than a fifth."
    remedy = "Find the change that did it, by measuring both versions in turn on one machine."
    exit_code = 1


class DatasetMissing(FedsealError):
    """A public dataset that a scenario names is not on this machine."""

    code = "FS-DATA-02"
    what = "A public dataset that the scenario needs is not on this machine."
    remedy = "Put its files where docs/scenarios.md says, or name their folder in FEDSEAL_DATA."
    exit_code = 6


class LedgerOutrun(LedgerRollback):
    """Others hold a message that this owner signed and whose ledger head this ledger does not hold."""

    code = "FS-LEDGER-04"
    what = "This owner signed a ledger head that its ledger does not hold: the ledger is an older copy."
    remedy = "Restore the newest ledger; if it is lost, declare its cost with fedseal ledger adopt."
    exit_code = 3


class ShareTooSmall(FedsealError):
    """A noise share is too small beside the quantization grid for the proof of distributed noise."""

    code = "FS-PLAN-04"
    what = "An owner's noise share is too small beside the quantization grid."
    remedy = (
        "Choose a finer encryption.preset, a smaller cohort.maximum or expected_batch_size, more noise."
    )
    exit_code = 2


class AccountantRefused(FedsealError):
    """A plan names a way of counting privacy loss that gives no usable bound."""

    code = "FS-PLAN-05"
    what = "This accountant is not offered."
    remedy = (
        "Leave privacy.accountant out: 'pld' is the tightest bound; fedseal privacy plan shows the others."
    )
    exit_code = 2


class ExamplesMixed(ModelUnsafe):
    """The output for one example depends on the other examples of the batch."""

    code = "FS-MODEL-02"
    what = "The model's output for one example depends on other examples of the batch."
    remedy = "Compute every example by itself: no mean, sort, or count over the batch's first dimension."
    exit_code = 6


class StatisticsKept(ModelUnsafe):
    """A layer keeps statistics of its inputs, or the model has buffers."""

    code = "FS-MODEL-03"
    what = "The model has buffers, or a layer that keeps statistics of its inputs."
    remedy = "Replace BatchNorm by GroupNorm or LayerNorm, and compute constants in forward."
    exit_code = 6


class ParameterUnused(ModelUnsafe):
    """A trained parameter takes no part in the loss."""

    code = "FS-MODEL-04"
    what = "A trained parameter takes no part in the loss, so that it would receive noise alone."
    remedy = "Remove the named parameter, or freeze it with requires_grad_(False)."
    exit_code = 6


class WeightsTied(ModelUnsafe):
    """One parameter stands at two places of the model."""

    code = "FS-MODEL-05"
    what = "One parameter stands at two places of the model."
    remedy = "Give each layer weights of its own; the norm of a shared weight's gradient is not the sum."
    exit_code = 6


class LayerUnsupported(ModelUnsafe):
    """No gradient engine gives the right per-example gradients of this model."""

    code = "FS-MODEL-06"
    what = "No gradient engine gives the gradient of each example for this model."
    remedy = "Build it from the layers of docs/privacy.md, or set training.gradient_engine = 'auto'."
    exit_code = 6


class NoiseSeeded(FedsealError):
    """Noise does not come from the stream that the operating system keys."""

    code = "FS-NOISE-01"
    what = "The noise does not come from a stream that the operating system keys for every step."
    remedy = "Use client.noise.SecureStream as it is; a noise that a seed repeats can be subtracted."
    exit_code = 6


class SamplerReplaced(FedsealError):
    """Batches are not drawn by independent secret coins with the plan's probability."""

    code = "FS-NOISE-02"
    what = "Batches are not drawn by a secret coin for each record with the plan's probability."
    remedy = "Use client.noise.SecureStream.coins as it is; the accounting holds for Poisson batches alone."
    exit_code = 6


class EvaluationRefused(FedsealError):
    """A coordinator asks for counts that the plan does not allow."""

    code = "FS-ROUND-04"
    what = "The plan does not allow this evaluation."
    remedy = (
        "Only what the plan's section evaluation names is counted, once for each model; docs/privacy.md."
    )
    exit_code = 4


class LogBroken(FedsealError):
    """The log of acts was changed, shortened or damaged."""

    code = "FS-LOG-01"
    what = "The log of acts is not the one that was written."
    remedy = "Keep the folder log/ as evidence: move it away, find out who could write to it, start anew."
    exit_code = 3


class RunPaused(FedsealError):
    """A run stopped before its last round and can go on."""

    code = "FS-RUN-04"
    what = "The run is paused; every finished round is kept."
    remedy = "Mend the cause and go on with fedseal run --resume RUN --home HOME."
    exit_code = 11


class RunInterrupted(FedsealError):
    """The coordinator's process ended in the middle of a run or of an attempt."""

    code = "FS-RUN-05"
    what = "The coordinator's process ended during the run; the attempt under way is void."
    remedy = "Start fedseal server if it has ended, and go on with fedseal run --resume RUN --home HOME."
    exit_code = 11


class RunBusy(FedsealError):
    """Another process carries the run out."""

    code = "FS-RUN-06"
    what = "Another process carries this run out."
    remedy = "Wait for its end, or stop that process; a run has one coordinator at a time."
    exit_code = 7


class ExecutorLost(FedsealError):
    """The program that starts the processes of runs ends again and again."""

    code = "FS-RUN-09"
    what = "The coordinator cannot keep the program running that starts runs."
    remedy = "Look at the coordinator's log and its free memory, and start it again; then resume the run."
    exit_code = 7


class ResultUndeliverable(FedsealError):
    """What a run would end in could not be written, as was found before anybody joined."""

    code = "FS-RUN-10"
    what = "The result of this run could not be written; it was not begun."
    remedy = (
        "Choose another --out, make the named folder writable, or free disk space; nothing was charged."
    )
    exit_code = 10


class CheckpointInvalid(FedsealError):
    """The model of the last finished round is missing or is not the recorded one."""

    code = "FS-RUN-07"
    what = "The checkpoint of the last finished round is missing or is not the recorded one."
    remedy = "Restore the run's folder from a backup, checkpoints and run.db together, or start a new run."
    exit_code = 12


class FindingsRefused(FedsealError):
    """An owner's findings are foreign, altered or about something else."""

    code = "FS-AUDIT-02"
    what = "An owner's findings were refused."
    remedy = "Ask that owner for the file that fedseal audit owner wrote for this run, unchanged."
    exit_code = 9


class AuditUnfounded(FedsealError):
    """An audit lacks what its experiments need."""

    code = "FS-AUDIT-03"
    what = "The audit cannot be made."
    remedy = "Give what is named: a plan that owners accept, --public examples, or --home of the run."
    exit_code = 9
