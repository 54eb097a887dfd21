//! Programs, drawn from a seed.

use crate::program::{EVENTS, Member, Node, Program, Step, Together, Undo, Use, Value};
use crate::seed::Seed;

/// How many processes clients start; the others are children.
pub const MOST: u64 = 9;

/// The variables of a process: few, so that its nodes meet in them.
pub const VARIABLES: [&str; 2] = ["v1", "v2"];

/// The programs of a seed. Where there is little room in memory, none may hold a waker of its own while it waits: it would
/// never leave.
pub fn programs(seed: &mut Seed, room: bool) -> Vec<Program> {
    let starts = seed.between(1, MOST) as usize;
    let children = seed.below(4) as usize;
    let mut programs = Vec::new();
    for index in 0..starts + children {
        let child = index >= starts;
        let mut draw =
            Draw { seed, room, index, starts, all: starts + children, names: 0, values: 0, awaited: Vec::new() };
        let size = draw.seed.between(1, if child { 4 } else { 8 });
        let nodes = (0..size).map(|_| draw.node(&[0, 1, 2], 2)).collect();
        let compensation = (0..draw.seed.below(4)).map(|_| draw.undo()).collect();
        let mut program = Program { nodes, compensation, child, renamed: None };
        if draw.seed.permille(250) {
            let steps = program.steps();
            program.renamed = (!steps.is_empty()).then(|| (*draw.seed.one(&steps)).to_owned());
        }
        programs.push(program);
    }
    programs
}

struct Draw<'s> {
    seed: &'s mut Seed,
    room: bool,
    index: usize,
    starts: usize,
    all: usize,
    names: u32,
    values: u64,
    /// Children that have a name in it already: each is used once.
    awaited: Vec<usize>,
}

impl Draw<'_> {
    fn name(&mut self, of: &str) -> String {
        self.names += 1;
        format!("{of}{}", self.names)
    }

    /// A node, that receives these events only, with so many levels of nodes within.
    fn node(&mut self, events: &[usize], levels: u32) -> Node {
        match self.seed.below(if levels > 0 { 36 } else { 27 }) {
            0..6 => Node::Step(self.step()),
            6..8 => {
                let one = loop {
                    let node = self.keyed(events);
                    if !matches!(node, Node::Dropped(..)) {
                        break node;
                    }
                };
                Node::Dropped(Box::new(one), self.seed.ms(1_000))
            }
            8..11 => {
                let step = self.step();
                Node::Transaction(Step { name: self.name("t"), takes: step.takes.min(800), timeout: None, ..step })
            }
            11..13 => Node::Value(self.value()),
            13..16 => Node::Delay { name: self.name("d"), ms: self.seed.ms(30_000) },
            16..20 if !events.is_empty() => {
                let timeout = self.seed.permille(400).then(|| self.seed.ms(20_000));
                Node::Receive { event: *self.seed.one(events), timeout }
            }
            20..22 => {
                let to = self.seed.below(self.all as u64) as usize;
                Node::Raise { to, event: self.seed.below(EVENTS as u64) as usize, key: self.name("k") }
            }
            22..24 => match self.child() {
                Some(child) => Node::Child { child, awaited: self.seed.permille(800) },
                None => Node::Step(self.step()),
            },
            24..27 => self.race(events),
            27..31 => {
                let together = *self
                    .seed
                    .one(&[Together::All, Together::Join, Together::Unordered][..if self.room { 3 } else { 2 }]);
                // Two receives of one event at the same time are a mistake.
                let halves: [&[usize]; 3] = [&events[..events.len() / 2], &events[events.len() / 2..], &[]];
                let branches = self.seed.between(2, 3) as usize;
                let branch = |draw: &mut Self, at: usize| {
                    (0..draw.seed.between(1, 2)).map(|_| draw.node(halves[at], levels - 1)).collect()
                };
                Node::Both(together, (0..branches).map(|at| branch(self, at)).collect())
            }
            34.. => Node::Forward((0..self.seed.between(1, 2)).map(|_| self.node(events, levels - 1)).collect()),
            31..34 => {
                let times = self.seed.between(2, 4);
                // Children and branches have no keys: none of those within a loop.
                let body = (0..self.seed.between(1, 2)).map(|_| self.keyed(events)).collect();
                Node::Loop { times, body }
            }
            _ => Node::Step(self.step()),
        }
    }

    fn keyed(&mut self, events: &[usize]) -> Node {
        loop {
            let node = self.node(events, 0);
            let fits = match &node {
                Node::Child { .. } => false,
                Node::Race { members, .. } => !members.iter().any(|member| matches!(member, Member::Output(_))),
                _ => true,
            };
            if fits {
                return node;
            }
        }
    }

    fn value(&mut self) -> Value {
        let (name, keyed) = ((*self.seed.one(&VARIABLES)).to_owned(), self.seed.permille(300));
        let uses = self.seed.between(1, 4);
        let uses = (0..uses).map(|_| {
            self.values += 1;
            if self.seed.permille(500) { Use::Get } else { Use::Set(self.values) }
        });
        Value { name, keyed, uses: uses.collect() }
    }

    fn undo(&mut self) -> Undo {
        match self.seed.below(6) {
            0..4 => Undo::Step(self.step()),
            4 => Undo::Value(self.value()),
            _ => Undo::Recall((*self.seed.one(&VARIABLES)).to_owned()),
        }
    }

    fn step(&mut self) -> Step {
        let fails = if self.seed.permille(300) { self.seed.between(1, 3) as u32 } else { 0 };
        let attempts = if self.seed.permille(850) { fails + 1 } else { fails.max(1) };
        let takes = self.seed.ms(6_000);
        let timeout = self.seed.permille(100).then(|| self.seed.between(1, 2_000));
        let name = self.name("s");
        let pause = self.seed.ms(15_000);
        Step { name, fails, attempts, pause, takes, timeout, fatal: self.seed.permille(300) }
    }

    /// A child that it has no name of yet. Only of higher index, so that nobody waits in a circle.
    fn child(&mut self) -> Option<usize> {
        let first = self.starts.max(self.index + 1);
        let free: Vec<usize> = (first..self.all).filter(|child| !self.awaited.contains(child)).collect();
        if free.is_empty() {
            return None;
        }
        let child = *self.seed.one(&free);
        self.awaited.push(child);
        Some(child)
    }

    fn race(&mut self, events: &[usize]) -> Node {
        let name = self.name("r");
        let delay = Member::Delay { name: self.name("d"), ms: self.seed.ms(20_000) };
        let mut members = vec![delay];
        if !events.is_empty() && self.seed.permille(700) {
            members.push(Member::Receive(*self.seed.one(events)));
        }
        if self.seed.permille(400) {
            members.push(Member::Step(self.step()));
        }
        if self.seed.permille(300)
            && let Some(child) = self.child()
        {
            members.push(Member::Output(child));
        }
        if self.seed.permille(500) {
            members.reverse();
        }
        Node::Race { name, members }
    }
}
