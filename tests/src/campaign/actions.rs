//! Using the hosts as their callers do.
//!
//! Owns: requests, and what their answers mean for what must be true. Must not know: faults.

use std::io::Write as _;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use super::dice::Dice;
use super::model::{Acknowledged, Doing, Guest, Model, There};
use super::watch::Watch;
use super::world::{NAMES, World};
use crate::http::{Reply, Request};

/// Most guests at a time.
const GUESTS: usize = 6;

/// Everything that callers do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Defines a guest.
    Define,
    /// Starts one.
    Start,
    /// Pauses one.
    Pause,
    /// Resumes one.
    Resume,
    /// Stops one.
    Stop,
    /// Deletes one.
    Delete,
    /// Changes a label.
    Relabel,
    /// Moves one to the other host.
    Migrate,
    /// Asks for several migrations of one guest at once.
    Compete,
    /// Cancels a migration.
    Cancel,
    /// Changes a migration's limits.
    Limit,
    /// Asks only what would come of a change.
    DryRun,
    /// Sends a change and does not wait for the answer.
    HangUp,
    /// Makes a token, or withdraws one.
    Token,
}

/// All of them with how often they come.
pub const ACTIONS: [(u64, Action); 14] = [
    (6, Action::Define),
    (8, Action::Start),
    (2, Action::Pause),
    (3, Action::Resume),
    (2, Action::Stop),
    (2, Action::Delete),
    (5, Action::Relabel),
    (14, Action::Migrate),
    (3, Action::Compete),
    (3, Action::Cancel),
    (2, Action::Limit),
    (2, Action::DryRun),
    (4, Action::HangUp),
    (2, Action::Token),
];

/// One caller's view.
pub struct Caller<'w> {
    /// The hosts.
    pub world: &'w World,
    /// What must be true.
    pub model: &'w mut Model,
    /// Who looks on.
    pub watch: &'w Watch,
    /// Number of the step: what is made has it in its name.
    pub step: u64,
}

fn definition(name: &str, dice: &mut Dice) -> Value {
    let kind = if crate::guest::has_kvm() && dice.once_in(2) { "embedded" } else { "emulated" };
    json!({
        "name": name,
        "driver": {"kind": kind, "vcpus": 1, "workload": {
            "fill": "random", "working_set_bytes": 1 << 20,
            "dirty_bytes_per_second": *dice.of(&[0, 256 << 10, 2 << 20])}},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": *dice.of(&[4, 8, 16]) << 20, "gpa": 0}]},
    })
}

fn moving(guest: &str, to: usize, dice: &mut Dice) -> Value {
    let mut limits = json!({"stall_timeout_ms": *dice.of(&[2000, 3000, 5000])});
    if dice.once_in(3) {
        limits["bandwidth_bytes_per_second"] = json!(*dice.of(&[2, 8, 32]) << 20);
    }
    // A guest may write faster than its link takes it: that ends when the caller says.
    limits["timeout_ms"] = json!(*dice.of(&[1000, 10_000, 20_000]));
    limits["on_timeout"] = json!(*dice.of(&["cancel", "force"]));
    json!({
        "guest": guest,
        "destination": {"kind": "host", "host": NAMES[to]},
        "mode": *dice.of(&["precopy", "precopy", "stop_and_copy"]),
        "streams": 1 + dice.below(2),
        "verify": dice.once_in(2),
        "limits": limits,
        "on_success": {"source": *dice.of(&["keep_stopped", "delete"])},
    })
}

impl Caller<'_> {
    /// Sends a change to a host; `None` when no answer came.
    fn send(&mut self, side: usize, what: &str, request: &Request) -> Option<Reply> {
        if !self.world.sides[side].up {
            return None;
        }
        let reply = request.try_send(&self.world.sides[side].daemon.socket()).ok()?;
        if reply.status < 400 {
            let request = reply.header("x-request-id").unwrap_or_default().to_owned();
            let status = reply.status;
            self.model.acknowledged[side].push(Acknowledged { request, status, what: what.into() });
        } else {
            let code = reply.problem();
            assert_ne!(code, "internal", "{what} at {}: {}", NAMES[side], reply.text());
        }
        Some(reply)
    }

    /// Where a guest's record is that was not handed over; the record.
    fn home(&self, name: &str) -> Option<(usize, Value)> {
        (0..2).find_map(|side| {
            let here = &self.world.sides[side];
            let request = Request::new("GET", &format!("/v1/guests/{name}"));
            let reply =
                request.try_send(&here.daemon.socket()).ok().filter(|r| here.up && r.status == 200)?;
            let record = reply.json();
            (record["moved_to"].is_null() && record["state"] != "incoming").then_some((side, record))
        })
    }

    fn some_guest(&self, dice: &mut Dice) -> Option<(String, usize, Value)> {
        let alive = self.model.alive();
        if alive.is_empty() {
            return None;
        }
        let name = dice.of(&alive).clone();
        let (side, record) = self.home(&name)?;
        Some((name, side, record))
    }

    fn some_migration(&self, dice: &mut Dice) -> Option<(usize, String)> {
        let side = dice.below(2) as usize;
        let request = Request::new("GET", "/v1/migrations?limit=50&sort_by=-created_at");
        let here = &self.world.sides[side];
        let reply = request.try_send(&here.daemon.socket()).ok().filter(|r| here.up && r.status == 200)?;
        let list = reply.json();
        let going: Vec<&Value> =
            list["items"].as_array()?.iter().filter(|m| !crate::guest::is_terminal(&m["state"])).collect();
        if going.is_empty() {
            return None;
        }
        Some((side, dice.of(&going)["id"].as_str()?.to_owned()))
    }

    fn guest(&mut self, name: &str) -> &mut Guest {
        self.model.guests.get_mut(name).unwrap()
    }

    /// Does it; what it was in words and what was answered, or nothing when there is nothing to do it to.
    pub fn act(&mut self, action: Action, dice: &mut Dice) -> Option<String> {
        match action {
            Action::Define => self.define(dice),
            Action::Start => self.start(dice),
            Action::Pause => self.act_on(dice, "pause", Doing::Paused),
            Action::Resume => self.act_on(dice, "resume", Doing::Runs),
            Action::Stop => self.act_on(dice, "stop", Doing::Stopped),
            Action::Delete => self.delete(dice),
            Action::Relabel => self.relabel(dice),
            Action::Migrate => self.migrate(dice, 1),
            Action::Compete => self.migrate(dice, 3),
            Action::Cancel => self.cancel(dice),
            Action::Limit => self.limit(dice),
            Action::DryRun => self.dry_run(dice),
            Action::HangUp => self.hang_up(dice),
            Action::Token => self.token(dice),
        }
    }

    fn said(what: &str, reply: Option<&Reply>) -> Option<String> {
        let Some(reply) = reply else { return Some(format!("{what}: no answer")) };
        let code = if reply.status < 400 { String::new() } else { format!(" {}", reply.problem()) };
        Some(format!("{what}: {}{code}", reply.status))
    }

    fn define(&mut self, dice: &mut Dice) -> Option<String> {
        if self.model.alive().len() >= GUESTS {
            return None;
        }
        let (side, name) = (dice.below(2) as usize, format!("g{}", self.step));
        let what = format!("define {name} at {}", NAMES[side]);
        let reply =
            self.send(side, &what, &Request::new("POST", "/v1/guests").json(&definition(&name, dice)));
        let (there, id) = match &reply {
            None if !self.world.sides[side].up => return None,
            None => (There::Maybe, None),
            Some(r) if r.status == 201 => (There::Yes, r.json()["id"].as_str().map(str::to_owned)),
            Some(_) => return Self::said(&what, reply.as_ref()),
        };
        let guest = Guest { id, there, doing: Doing::Stopped, label: None, labels_maybe: Vec::new() };
        self.model.guests.insert(name, guest);
        Self::said(&what, reply.as_ref())
    }

    fn start(&mut self, dice: &mut Dice) -> Option<String> {
        let (name, side, record) = self.some_guest(dice)?;
        if record["state"] == "running" {
            return None;
        }
        let id = record["id"].as_str().unwrap().to_owned();
        let what = format!("start {name} at {}", NAMES[side]);
        self.watch.is_started(&id);
        let reply = self.send(side, &what, &Request::new("POST", &format!("/v1/guests/{id}/start")));
        if reply.as_ref().is_some_and(|r| r.status < 300) {
            let (target, before) = (format!("/v1/guests/{id}"), record["generation"].clone());
            crate::until(&format!("{name} has started or failed"), 120, || {
                let reply = Request::new("GET", &target).try_send(&self.world.sides[side].daemon.socket());
                let record = reply.map_or(Value::Null, |r| r.json());
                let over = record["state"] == "failed" && record["generation"] != before;
                record["state"] == "running" || over
            });
            self.guest(&name).doing = Doing::Started;
        } else if reply.is_none() {
            self.guest(&name).doing = Doing::Unknown;
        }
        self.watch.forget(&id);
        Self::said(&what, reply.as_ref())
    }

    fn act_on(&mut self, dice: &mut Dice, verb: &str, then: Doing) -> Option<String> {
        let (name, side, _) = self.some_guest(dice)?;
        let what = format!("{verb} {name} at {}", NAMES[side]);
        let reply = self.send(side, &what, &Request::new("POST", &format!("/v1/guests/{name}/{verb}")));
        match &reply {
            // It may have been done.
            None => self.guest(&name).doing = Doing::Unknown,
            Some(r) if r.status < 300 => {
                let guest = self.guest(&name);
                // What follows something unknown may itself be overtaken by it.
                guest.doing = if guest.doing == Doing::Unknown { Doing::Unknown } else { then };
            }
            Some(_) => {}
        }
        Self::said(&what, reply.as_ref())
    }

    fn delete(&mut self, dice: &mut Dice) -> Option<String> {
        let (name, side, record) = self.some_guest(dice)?;
        if record["state"] != "stopped" && record["state"] != "failed" && !dice.once_in(4) {
            return None;
        }
        let what = format!("delete {name} at {}", NAMES[side]);
        let reply = self.send(side, &what, &Request::new("DELETE", &format!("/v1/guests/{name}")));
        match &reply {
            None => self.guest(&name).there = There::Maybe,
            Some(r) if r.status < 300 => self.guest(&name).there = There::No,
            Some(_) => {}
        }
        Self::said(&what, reply.as_ref())
    }

    fn label_request(name: &str, label: &str) -> Request {
        Request::new("PATCH", &format!("/v1/guests/{name}"))
            .header("content-type", "application/merge-patch+json")
            .body(json!({"labels": {"n": label}}).to_string())
    }

    fn relabel(&mut self, dice: &mut Dice) -> Option<String> {
        let (name, side, _) = self.some_guest(dice)?;
        let label = format!("s{}", self.step);
        let what = format!("label {name} {label} at {}", NAMES[side]);
        let reply = self.send(side, &what, &Self::label_request(&name, &label));
        let guest = self.guest(&name);
        match &reply {
            None => guest.labels_maybe.push(label),
            Some(r) if r.status < 300 => {
                guest.label = Some(label);
                guest.labels_maybe.clear();
            }
            Some(_) => {}
        }
        Self::said(&what, reply.as_ref())
    }

    fn migrate(&mut self, dice: &mut Dice, times: usize) -> Option<String> {
        let (name, side, _) = self.some_guest(dice)?;
        let what = format!("migrate {name} from {}", NAMES[side]);
        let bodies: Vec<Value> = (0..times).map(|_| moving(&name, 1 - side, dice)).collect();
        let socket = self.world.sides[side].daemon.socket();
        let replies: Vec<Option<Reply>> = std::thread::scope(|s| {
            let asked: Vec<_> = bodies
                .iter()
                .map(|body| {
                    let request = Request::new("POST", "/v1/migrations").json(body);
                    let socket = &socket;
                    s.spawn(move || request.try_send(socket).ok())
                })
                .collect();
            asked.into_iter().map(|a| a.join().unwrap()).collect()
        });
        let mut words = what.clone();
        for reply in replies {
            let Some(reply) = reply else {
                words.push_str(", no answer");
                continue;
            };
            if reply.status < 400 {
                let request = reply.header("x-request-id").unwrap_or_default().to_owned();
                let status = reply.status;
                self.model.acknowledged[side].push(Acknowledged { request, status, what: what.clone() });
                words.push_str(&format!(", {} {}", reply.status, reply.json()["id"]));
            } else {
                let code = reply.problem();
                assert_ne!(code, "internal", "{what}: {}", reply.text());
                words.push_str(&format!(", {} {code}", reply.status));
                if ["validation_failed", "malformed_request"].contains(&code.as_str()) {
                    words.push_str(&format!(" {}", reply.json()["errors"]));
                }
            }
        }
        Some(words)
    }

    fn cancel(&mut self, dice: &mut Dice) -> Option<String> {
        let (side, id) = self.some_migration(dice)?;
        let what = format!("cancel {id} at {}", NAMES[side]);
        let reply = self.send(side, &what, &Request::new("POST", &format!("/v1/migrations/{id}/cancel")));
        Self::said(&what, reply.as_ref())
    }

    fn limit(&mut self, dice: &mut Dice) -> Option<String> {
        let (side, id) = self.some_migration(dice)?;
        let what = format!("limit {id} at {}", NAMES[side]);
        let body = json!({"limits": {"bandwidth_bytes_per_second": *dice.of(&[1, 4, 64]) << 20}});
        let request = Request::new("PATCH", &format!("/v1/migrations/{id}"))
            .header("content-type", "application/merge-patch+json")
            .body(body.to_string());
        let reply = self.send(side, &what, &request);
        Self::said(&what, reply.as_ref())
    }

    fn dry_run(&mut self, dice: &mut Dice) -> Option<String> {
        let side = dice.below(2) as usize;
        let name = format!("dry{}", self.step);
        let what = format!("define {name} at {}, dry", NAMES[side]);
        let spelt = dice.of(&["dry_run=true", "dry%5Frun=true", "dry_run=tru%65", "dry_run=1"]);
        let request = Request::new("POST", &format!("/v1/guests?{spelt}")).json(&definition(&name, dice));
        let reply = self.send(side, &what, &request);
        // Nobody of that name may be there, whatever comes.
        let guest = Guest {
            id: None,
            there: There::No,
            doing: Doing::Stopped,
            label: None,
            labels_maybe: Vec::new(),
        };
        self.model.guests.insert(name, guest);
        Self::said(&what, reply.as_ref())
    }

    fn hang_up(&mut self, dice: &mut Dice) -> Option<String> {
        let side = dice.below(2) as usize;
        let here = &self.world.sides[side];
        if !here.up {
            return None;
        }
        let (what, request) = if dice.once_in(2) && self.model.alive().len() < GUESTS {
            let name = format!("h{}", self.step);
            let request = Request::new("POST", "/v1/guests").json(&definition(&name, dice));
            let guest = Guest {
                id: None,
                there: There::Maybe,
                doing: Doing::Stopped,
                label: None,
                labels_maybe: Vec::new(),
            };
            self.model.guests.insert(name.clone(), guest);
            (format!("define {name}"), request)
        } else {
            let (name, _, _) = self.some_guest(dice)?;
            let label = format!("h{}", self.step);
            let guest = self.model.guests.get_mut(&name).unwrap();
            guest.labels_maybe.push(label.clone());
            (format!("label {name} {label}"), Self::label_request(&name, &label))
        };
        if let Ok(mut stream) = UnixStream::connect(here.daemon.socket()) {
            let _ = stream.write_all(&request.bytes("localhost"));
        }
        Some(format!("{what} at {} and hang up", NAMES[side]))
    }

    fn token(&mut self, dice: &mut Dice) -> Option<String> {
        let side = dice.below(2) as usize;
        let (what, request, made) = match self.model.tokens[side].pop() {
            Some(id) if dice.once_in(2) => {
                (format!("withdraw {id}"), Request::new("DELETE", &format!("/v1/tokens/{id}")), Some(id))
            }
            kept => {
                self.model.tokens[side].extend(kept);
                let name = format!("t{}", self.step);
                let body = json!({"name": name, "role": "viewer", "expires_in_seconds": 300 * 86_400});
                (format!("token {name}"), Request::new("POST", "/v1/tokens").json(&body), None)
            }
        };
        let reply = self.send(side, &what, &request);
        match (made, &reply) {
            (None, Some(r)) if r.status == 201 => {
                self.model.tokens[side].push(r.json()["id"].as_str().unwrap().to_owned());
            }
            // Refused: it is still there.
            (Some(id), Some(r)) if r.status >= 400 => self.model.tokens[side].push(id),
            _ => {}
        }
        Self::said(&what, reply.as_ref())
    }
}
