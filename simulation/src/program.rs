//! What a process does: a program, that one durable function interprets.

use crate::interpret::MESSAGES;
use crate::tally::Sight;

/// How many events there are.
pub const EVENTS: usize = 3;

/// One process's program. Process `index` has the id `p<index>`.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// What it does.
    pub nodes: Vec<Node>,
    /// What it does in its compensation, if it fails or is cancelled.
    pub compensation: Vec<Undo>,
    /// Another process starts it, if any.
    pub child: bool,
    /// The step that a bad deployment calls by another name, without saying what it was called.
    pub renamed: Option<String>,
}

/// How a bad deployment calls a step.
pub fn renamed(name: &str) -> String {
    format!("{RENAMED}{name}")
}

/// What a step is called by all others.
pub fn first_name(name: &str) -> &str {
    name.strip_prefix(RENAMED).unwrap_or(name)
}

const RENAMED: &str = "new ";

/// One thing that a program does. Times are in milliseconds.
#[derive(Clone, Debug)]
pub enum Node {
    Step(Step),
    /// It is dropped after so long, if it has not ended, and done again under its name. One operation alone.
    Dropped(Box<Node>, u64),
    Transaction(Step),
    Value(Value),
    Delay {
        name: String,
        ms: u64,
    },
    Receive {
        event: usize,
        timeout: Option<u64>,
    },
    Raise {
        to: usize,
        event: usize,
        key: String,
    },
    /// Starts a process; awaits its end, too.
    Child {
        child: usize,
        awaited: bool,
    },
    Race {
        name: String,
        members: Vec<Member>,
    },
    /// Branches at the same time.
    Both(Together, Vec<Vec<Node>>),
    /// Behind a point of no return: no cancellation reaches it.
    Forward(Vec<Node>),
    /// The same names with another key each time.
    Loop {
        times: u64,
        body: Vec<Node>,
    },
}

/// How branches are awaited.
#[derive(Clone, Copy, Debug)]
pub enum Together {
    All,
    Join,
    Unordered,
}

/// What is done in a compensation.
#[derive(Clone, Debug)]
pub enum Undo {
    Step(Step),
    Value(Value),
    /// Gets what a variable of the process itself was last.
    Recall(String),
}

/// What is done with a variable, that other nodes may use as well.
#[derive(Clone, Debug)]
pub struct Value {
    pub name: String,
    /// Under the key of the loop that it stands in: each key has a value of its own.
    pub keyed: bool,
    pub uses: Vec<Use>,
}

#[derive(Clone, Copy, Debug)]
pub enum Use {
    Get,
    /// Each sets another value.
    Set(u64),
}

/// A step, or a transactional one.
#[derive(Clone, Debug)]
pub struct Step {
    pub name: String,
    /// How many of its attempts fail.
    pub fails: u32,
    /// How many attempts it has.
    pub attempts: u32,
    /// Between two of them.
    pub pause: u64,
    /// How long its body takes.
    pub takes: u64,
    /// After which an attempt is given up.
    pub timeout: Option<u64>,
    /// Its failure ends the process.
    pub fatal: bool,
}

/// One that takes part in a race.
#[derive(Clone, Debug)]
pub enum Member {
    Step(Step),
    Delay { name: String, ms: u64 },
    Receive(usize),
    Output(usize),
}

impl Node {
    /// As which it is counted.
    pub fn sight(&self) -> Sight {
        match self {
            Self::Step(_) => Sight::Step,
            Self::Dropped(..) => Sight::Dropped,
            Self::Transaction(_) => Sight::Transaction,
            Self::Value(_) => Sight::Variable,
            Self::Delay { .. } => Sight::Delay,
            Self::Receive { .. } => Sight::Receive,
            Self::Raise { .. } => Sight::Raise,
            Self::Child { .. } => Sight::Child,
            Self::Race { .. } => Sight::Race,
            Self::Both(Together::All, _) => Sight::All,
            Self::Both(Together::Join, _) => Sight::Join,
            Self::Both(Together::Unordered, _) => Sight::Unordered,
            Self::Forward(_) => Sight::Forward,
            Self::Loop { .. } => Sight::Loop,
        }
    }
}

impl Program {
    /// How many messages of each event it can take at most.
    pub fn receives(&self) -> [u64; EVENTS] {
        let mut count = [0; EVENTS];
        receives(&self.nodes, 1, &mut count);
        count
    }

    /// The events of whose messages a race takes one, by their names, if its timer leaves it at least so long.
    pub fn races(&self, name: &str, ms: u64) -> Vec<&'static str> {
        let mut events = Vec::new();
        races(&self.nodes, name, ms, &mut events);
        events
    }

    /// The names of steps whose failure ends the process.
    pub fn fatal(&self) -> Vec<&str> {
        let mut names = Vec::new();
        fatal(&self.nodes, &mut names);
        names
    }

    /// The names of its steps, but for those that take part in races.
    pub fn steps(&self) -> Vec<&str> {
        let mut names = Vec::new();
        steps(&self.nodes, &mut names);
        names
    }

    /// Whether it does anything behind a point of no return.
    pub fn goes_forward(&self) -> bool {
        fn any(nodes: &[Node]) -> bool {
            nodes.iter().any(|node| match node {
                Node::Forward(_) => true,
                Node::Dropped(node, _) => any(std::slice::from_ref(node)),
                Node::Both(_, branches) => branches.iter().any(|branch| any(branch)),
                Node::Loop { body, .. } => any(body),
                _ => false,
            })
        }
        any(&self.nodes)
    }

    /// How many results it leaves if nothing ends it early.
    pub fn results(&self) -> usize {
        results(&self.nodes)
    }

    /// The steps whose bodies run as often as they fail and once more, if nothing goes wrong around them.
    pub fn plain_steps(&self) -> Vec<(&Step, u64)> {
        let mut steps = Vec::new();
        plain(&self.nodes, 0, &mut steps);
        steps
    }
}

fn receives(nodes: &[Node], times: u64, count: &mut [u64; EVENTS]) {
    for node in nodes {
        match node {
            Node::Receive { event, .. } => count[*event] += times,
            Node::Race { members, .. } => {
                for member in members {
                    if let Member::Receive(event) = member {
                        count[*event] += times;
                    }
                }
            }
            Node::Dropped(node, _) => receives(std::slice::from_ref(node), times, count),
            Node::Both(_, branches) => branches.iter().for_each(|branch| receives(branch, times, count)),
            Node::Forward(body) => receives(body, times, count),
            Node::Loop { times: more, body } => receives(body, times * more, count),
            _ => {}
        }
    }
}

fn races(nodes: &[Node], of: &str, least: u64, events: &mut Vec<&'static str>) {
    for node in nodes {
        match node {
            Node::Race { name, members } if name == of => {
                let soon = |member: &Member| matches!(member, Member::Delay { ms, .. } if *ms < least);
                if members.iter().any(soon) {
                    continue;
                }
                let event = |member: &Member| match member {
                    Member::Receive(event) => Some(MESSAGES[*event].name()),
                    _ => None,
                };
                events.extend(members.iter().filter_map(event));
            }
            Node::Dropped(node, _) => races(std::slice::from_ref(node), of, least, events),
            Node::Both(_, branches) => branches.iter().for_each(|branch| races(branch, of, least, events)),
            Node::Forward(body) | Node::Loop { body, .. } => races(body, of, least, events),
            _ => {}
        }
    }
}

fn fatal<'p>(nodes: &'p [Node], names: &mut Vec<&'p str>) {
    for node in nodes {
        match node {
            Node::Step(step) | Node::Transaction(step) if step.fatal => names.push(&step.name),
            Node::Dropped(node, _) => fatal(std::slice::from_ref(node), names),
            Node::Both(_, branches) => branches.iter().for_each(|branch| fatal(branch, names)),
            Node::Forward(body) | Node::Loop { body, .. } => fatal(body, names),
            _ => {}
        }
    }
}

fn steps<'p>(nodes: &'p [Node], names: &mut Vec<&'p str>) {
    for node in nodes {
        match node {
            Node::Step(step) => names.push(&step.name),
            Node::Dropped(node, _) => steps(std::slice::from_ref(node), names),
            Node::Both(_, branches) => branches.iter().for_each(|branch| steps(branch, names)),
            Node::Forward(body) | Node::Loop { body, .. } => steps(body, names),
            _ => {}
        }
    }
}

fn results(nodes: &[Node]) -> usize {
    let of = |node: &Node| match node {
        Node::Value(_) => 0,
        Node::Dropped(node, _) => results(std::slice::from_ref(node)),
        Node::Child { awaited, .. } => 1 + usize::from(*awaited),
        Node::Both(_, branches) => branches.iter().map(|branch| results(branch)).sum(),
        Node::Forward(body) => results(body),
        Node::Loop { times, body } => *times as usize * results(body),
        _ => 1,
    };
    nodes.iter().map(of).sum()
}

fn plain<'p>(nodes: &'p [Node], loops: u64, steps: &mut Vec<(&'p Step, u64)>) {
    for node in nodes {
        match node {
            Node::Step(step) if step.timeout.is_none() => steps.push((step, loops)),
            Node::Both(_, branches) => branches.iter().for_each(|branch| plain(branch, loops, steps)),
            Node::Forward(body) => plain(body, loops, steps),
            Node::Loop { times, body } => plain(body, *times, steps),
            _ => {}
        }
    }
}
