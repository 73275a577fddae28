"""Recompute the verdict of a report without any code of the project: independent_verifier.py REPORT."""

# fmt: off
import base64
import hashlib
import json
import sys
from datetime import datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from jsonschema import Draft202012Validator

SCHEMA = json.loads((Path(__file__).parents[1] / "audit/schema/report-2.json").read_bytes())
TESTS, PLANNED = SCHEMA["$defs"]["required"]["properties"], "as planned"
PLACES, FREE = {"wire", "disk", "logs", "reports", "coordinator memory"}, "without protection"
AT = {"ciphertext frames": "train.seal", "opened sums": "query.open", "unclassified": 0, "global model": 0}
def signature_holds(r):
    s, rest = r["signature"], {k: r[k] for k in r if k != "signature"}
    raw, value = base64.b64decode(s["public_key"]), base64.b64decode(s["value"])
    text = b"fedseal/report/1\0" + json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    name = hashlib.sha256(bytes.fromhex("302a300506032b6570032100") + raw).hexdigest()
    try:
        return Ed25519PublicKey.from_public_bytes(raw).verify(value, text) is None and name == s["signer"]
    except InvalidSignature:
        return False
def run_checks(r):
    p, s, claims, enc, log = r["promise"], r["subject"], r["claims"], r["encryption"], r["rounds"]
    opened, known = [e for e in log if not e["void"]], {c["fingerprint"] for c in claims}
    losses = [(x, c["promised"]) for c in claims for x in (c["spent"], c["stated"]) if x]
    over = any(float(x[k]) > float(most[k]) for x, most in losses for k in most)
    over |= any(c["spent"]["epsilon"] == "inf" or not c["promise_matches_plan"] for c in claims)
    said = [(c["statement"], c["certificate_matches"] and not c["disagreements"]) for c in claims]
    wrong, silent = any(n == "invalid" or not fine for n, fine in said), "missing" in dict(said) or not said
    unsigned = any(c["statement"] != "missing" and not c["model_signed"] for c in claims)
    groups = [set(e["contributors"]) for e in opened]
    small = any(len(g) < p["cohort_minimum"] or not g <= known for g in groups)
    got = [e for e in r["transcript"] if e["direction"] == "received"]
    odd = any(AT.get(e["content"], e["kind"]) != e["kind"] for e in got)
    odd |= any(e["content"] == "error code" and e["max_bytes"] > 4096 for e in got)
    each = (enc["frame_bytes"] or 0) / max(1, enc["values_per_frame"])
    large = each > {"exact16": 3.6, "compact": 2.4}.get(enc["preset"], 4) or each >= 4
    start, end, at = s["started_at"], s["finished_at"], datetime.fromisoformat
    old = at(start) > at(end) or not all(c["certificate_covers_run"] for c in claims)
    old |= any(at(c["not_before"]) > at(start) or at(end) > at(c["not_after"]) for c in r["certificates"]
               if not c["role"].startswith("owner"))
    plan = p["evaluation"] or {"every": 1, "evaluations": 0}
    counted = [e["round"] for e in opened if e["purpose"] == "evaluate"]
    extra = sum(e["purpose"] == "evaluate" for e in log) > plan["evaluations"]
    extra |= len({n for n in counted if n % plan["every"] == 0 or n == p["rounds"]}) < len(counted)
    done, moved = len(opened) - len(counted), s["plan_hash"] != s["plan_hash_recomputed"]
    ended = s["state"] == "finished" and done == p["rounds"]
    moved |= s["initial_model_hash"] != s["initial_model_hash_planned"]
    states = {
        "noise-on": (p["noise"] == "none", False), "noise-shares": (False, p["noise"] == "distributed"),
        "budget-kept": (over, not claims), "evaluations-planned": (extra, False),
        "statements-agree": (wrong, silent), "model-countersigned": (unsigned, silent),
        "received-content": (odd, not got), "update-size": (large, not enc["frame_bytes"]),
        "cohort-size": (small, not opened), "plan-binding": (moved, False),
        "ledger-forward": (any(c["ledger_went_back"] for c in claims), False),
        "openings-agree": (any(e["agreeing_openings"] < p["quorum"] for e in opened), not opened),
        "encryption-strength": (enc["security_level_bits"] < 128 or not enc["exact"], False),
        "run-complete": (s["state"] == "failed" or done != s["rounds_finished"], not ended)}
    if s["kind"] == "deployment":
        tls = r["tls"]["version"] == "TLSv1.3" and r["tls"]["client_certificate_required"]
        states |= {"certificates": (old, "server" not in {c["role"] for c in r["certificates"]})}
        states |= {"no-server-key": (r["server"]["has_secret_key"], False), "tls": (not tls, False)}
    return states
def signed_bodies(r):
    run = (None, r["subject"]["run"])
    return [(f["signer"], f["body"]) for f in r["findings"] if f["valid"] and f["body"]["run"] in run]
def tested(r, m):
    p, noisy = r["promise"], r["promise"]["noise"] != "none"
    mine = noisy and p["unit"] == "example"
    on = {"always": True, "noise": noisy, "own model": noisy, "noise per example": mine, "sampling":
          p["sample_rate"] < 1, "BFV": r["encryption"]["scheme"] == "BFV", "own model per example": mine}
    need = {t for g, new in TESTS.items() if on[g] for t in new["enum"]}
    have = {t["test"] for t in m["conformance"] if t["threshold"] >= 1e-6 and t["samples"]}
    bad = any(t["p_value"] < max(t["threshold"], 1e-6) for t in m["conformance"])
    return bad, not need <= have or m["plan_hash"] != r["subject"]["plan_hash"]
def lab_checks(r):
    p, s, lab = r["promise"], r["subject"], r["laboratory"] or {"ciphertexts": 0, "ciphertexts_repeated": 0}
    mechanism = lab.get("mechanism", {"conformance": [], "bounds": [], "plan_hash": "", "made_at": ""})
    mia, tried, scans = (lab.get(k, []) for k in ("membership", "inversion", "markers"))
    states = {"mechanism-conformance": tested(r, mechanism)}
    made = [mechanism] + [b["mechanism"] for _, b in signed_bodies(r)]
    bounds = [b for m in made if m["plan_hash"] == s["plan_hash"] for b in m["bounds"]]
    claimed = [b for b in bounds if b["claimed"] is not None and b["canaries"] >= 100]
    sound = [b for b in claimed if b["confidence"] >= 0.95 and b["delta"] <= p["delta"] * (1 + 1e-6)]
    above = any(b["epsilon"] > b["claimed"] for b in bounds if b["claimed"] is not None)
    able = [b for b in sound if (b["control"] or 0) > b["claimed"] and b["detectable"] is not None]
    deaf = len(sound) < len(bounds) or not {"update", "opened sum"} <= {b["observer"] for b in able}
    asked = {"update", "wire", "opened sum", "exported model" if p["unit"] == "example" else "wire"}
    deaf |= not asked <= {b["observer"] for b in sound}
    kept = [(a["tpr_at_1_percent"]["low"], a["ceiling_at_1_percent"]) for a in mia if a["model"] != FREE]
    high = any(low > (1 if most is None else most) for low, most in kept)
    rows = [((a["attack"], a["group"]), a["model"], a["tpr_at_1_percent"]) for a in mia]
    best = dict(sorted((kind, t["value"]) for kind, m, t in rows if m == PLANNED))
    works = any(t["low"] > max(0.01, best.get(kind, 1)) for kind, m, t in rows if m == FREE)
    few = len({(k, m) for k, m, _ in rows if k[0] != "loss threshold" and m != "exported"}) < 8
    few |= any(a["members"] < 100 or a["outsiders"] < 368 for a in mia if a["group"] == "all records")
    if p["noise"] != "none":
        lacking = few or not works or any(most is None for _, most in kept)
        states |= {"membership-inference": (high, lacking), "lower-bounds": (above, deaf)}
    seen = {"received by the coordinator"} | ({"private update"} if p["noise"] != "none" else set())
    back = {a["observed"] for a in tried if a["rebuilt"]}
    pairs = {(a, o) for a in ("optimization", "imprint") for o in seen | {"plain update"}}
    untried = "plain update" not in back or not pairs <= {(a["attack"], a["observed"]) for a in tried}
    dim = PLACES - {c["place"] for c in scans if c["markers"] and c["searched_bytes"] and c["control_hits"]}
    summed = sum(len(e["contributors"]) for e in r["rounds"] if not e["void"])
    states |= {"ciphertext-reuse": (lab["ciphertexts_repeated"], lab["ciphertexts"] < max(1, summed))}
    found = any(c["hits"] for c in scans)
    return states | {"gradient-inversion": (back & seen, untried), "marker-scan": (found, dim)}
def owner_checks(r):
    bodies, lab, owners = signed_bodies(r), r["laboratory"], {o["fingerprint"]: o for o in r["owners"]}
    results = [tested(r, b["mechanism"]) for _, b in bodies]
    codes = {m["mechanism"]["code_hash"] for m in [b for _, b in bodies] + ([lab] if lab else [])}
    forged, over = not all(f["valid"] for f in r["findings"]), False
    stored = [k for k in sum((b["custody"] for _, b in bodies), r["keys"]) if k["place"] != "memory"]
    loose = any(not k["encrypted_at_rest"] or int(k["mode"] or "777", 8) & 0o77 for k in stored)
    for c, o in ((c, owners[c["fingerprint"]]) for c in r["claims"]):
        heads = [o["ledger_last"]] + ([o["statement"]["body"]["ledger"]] if o["statement"] else [])
        for t in (b["ledger"] for name, b in bodies if name == c["fingerprint"] and b["ledger"]):
            n = {k: float("inf" if t[k] is None else t[k]) for k in t if "_" in k}
            over |= any(n["spent_" + k] > n["cap_" + k] * (1 + 1e-6) for k in ("epsilon", "delta"))
            over |= n["this_run_epsilon"] < float(c["spent"]["epsilon"]) * (1 - 1e-6)
            over |= any(h["sequence"] >= t["sequence"] and h != {k: t[k] for k in h} for h in heads)
    bad, asked = forged or any(bad for bad, _ in results) or len(codes) > 1, set(owners) or {""}
    kept = {o for o, b in bodies if any(k["place"] != "memory" for k in b["custody"])}
    own = any(k["holder"] == "coordinator" and k["place"] != "memory" for k in r["keys"])
    untested = not asked <= {o for o, _ in bodies} or any(lack for _, lack in results)
    return {"key-custody": (forged or loose, not own or not asked <= kept), "owner-code": (bad, untested),
            "owner-ledgers": (forged or over, not asked <= {o for o, b in bodies if b["ledger"]})}
def main(path):
    r = json.loads(text := Path(path).read_text())
    Draft202012Validator(SCHEMA).validate(r)
    own = owner_checks(r) if r["subject"]["kind"] == "deployment" else {}
    states = run_checks(r) | lab_checks(r) | own
    found = {k: "fail" if bad else "missing" if lack else "pass" for k, (bad, lack) in states.items()}
    worst = max(("pass", "missing", "fail").index(state) for state in found.values())
    stated = {c["id"]: c["status"] for c in r["checks"] if c["status"] != "not applicable"}
    verdict, seal = ("PASS", "INCONCLUSIVE", "FAIL")[worst], r["signature"] is None or signature_holds(r)
    agrees = seal and (found, verdict) == (stated, r["verdict"]["status"])
    agrees &= json.dumps(r, indent=2, sort_keys=True, allow_nan=False) + "\n" == text
    print(verdict if agrees else f"It does not agree. Found: {found}")
    return (0, 2, 1)[worst] if agrees else 3

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
