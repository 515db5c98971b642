//! What machine this is, and how busy, hot and fast it was while something was measured.
//!
//! From `/proc` and `/sys` on Linux and `sysctl` on macOS. What the system does not say is `None`. The parsers take text,
//! so those of both systems are tested on either.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use zmlx_mlx::platform::Platform;

/// A machine.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: Option<String>,
    /// Cores that this program may use.
    pub cores: u64,
    /// Main memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Bytes of the last level of caches, all of its instances together.
    pub last_level_cache_bytes: Option<u64>,
    /// The operating system and its version.
    pub os: String,
    /// The architecture, such as `x86_64`.
    pub arch: String,
    /// How the system sets the clock, such as `performance`.
    pub governor: Option<String>,
}

impl Machine {
    /// The one that this runs on.
    pub fn look() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let found = match Platform::HERE {
            Platform::Linux => linux(),
            Platform::MacOs => mac(&sysctl(MAC_NAMES)),
        };
        Self { cores, arch: std::env::consts::ARCH.to_owned(), ..found }
    }
}

fn linux() -> Machine {
    let release = read("/etc/os-release").and_then(|text| {
        let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
        Some(name.trim_matches('"').to_owned())
    });
    let kernel = read("/proc/sys/kernel/osrelease").map(|v| format!("Linux {}", v.trim()));
    let os: Vec<String> = release.into_iter().chain(kernel).collect();
    Machine {
        cpu: read("/proc/cpuinfo").and_then(|text| cpu_name(&text)),
        memory_bytes: read("/proc/meminfo").and_then(|text| memory_bytes(&text)),
        last_level_cache_bytes: caches(Path::new("/sys/devices/system/cpu")),
        os: if os.is_empty() { "Linux".to_owned() } else { os.join(", ") },
        governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").map(|v| v.trim().to_owned()),
        ..Machine::default()
    }
}

const MAC_NAMES: &[&str] = &[
    "machdep.cpu.brand_string",
    "kern.osproductversion",
    "hw.memsize",
    "hw.l3cachesize",
    "hw.perflevel0.l2cachesize",
    "hw.l2cachesize",
];

fn mac(text: &str) -> Machine {
    let number = |name: &str| value(text, name)?.parse().ok().filter(|&n: &u64| n > 0);
    let version = value(text, "kern.osproductversion");
    Machine {
        cpu: value(text, "machdep.cpu.brand_string").map(str::to_owned),
        memory_bytes: number("hw.memsize"),
        // Apple's chips share the second level among the cores of a kind, and have no third.
        last_level_cache_bytes: MAC_NAMES[3..].iter().find_map(|name| number(name)),
        os: version.map_or_else(|| "macOS".to_owned(), |v| format!("macOS {v}")),
        ..Machine::default()
    }
}

/// The value of `name: value` lines.
fn value<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'))?;
    Some(line.trim()).filter(|v| !v.is_empty())
}

/// What `sysctl` prints of these names; nothing where there is none.
fn sysctl(names: &[&str]) -> String {
    let out = Command::new("/usr/sbin/sysctl").args(names).env("LC_ALL", "C").output();
    out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default()
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// `model name` on x86; ARM has no such line, but often `Hardware`.
fn cpu_name(cpuinfo: &str) -> Option<String> {
    ["model name", "Hardware", "Model"].iter().find_map(|name| value(cpuinfo, name)).map(str::to_owned)
}

fn memory_bytes(meminfo: &str) -> Option<u64> {
    let kib: u64 = value(meminfo, "MemTotal")?.strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Bytes of the highest level of caches, each instance (cores that share one name the same list) counted once.
fn caches(cpus: &Path) -> Option<u64> {
    let mut found: BTreeMap<(u32, String), u64> = BTreeMap::new();
    for cpu in fs::read_dir(cpus).ok()?.flatten() {
        let Ok(indices) = fs::read_dir(cpu.path().join("cache")) else { continue };
        for index in indices.flatten() {
            let part = |name: &str| read(index.path().join(name)).map(|v| v.trim().to_owned());
            let (Some(level), Some(size), Some(shared)) =
                (part("level"), part("size"), part("shared_cpu_list"))
            else {
                continue;
            };
            if part("type").as_deref() == Some("Instruction") {
                continue;
            }
            if let (Ok(level), Some(size)) = (level.parse(), size_bytes(&size)) {
                found.insert((level, shared), size);
            }
        }
    }
    let highest = found.keys().map(|(level, _)| *level).max()?;
    Some(found.iter().filter(|((level, _), _)| *level == highest).map(|(_, size)| size).sum())
}

/// `32768K`, `64M`, `512`.
fn size_bytes(text: &str) -> Option<u64> {
    let (digits, factor) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(factor).filter(|&n| n > 0)
}

/// The state of the machine around a measurement.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Conditions {
    /// Seconds that it took in all.
    pub seconds: f64,
    /// Load averages of 1, 5 and 15 minutes at its start.
    pub load_before: Option<[f64; 3]>,
    /// And at its end, this program included.
    pub load_after: Option<[f64; 3]>,
    /// Cores that other programs used on average meanwhile.
    pub foreign_cores: Option<f64>,
    /// Cores that the hypervisor gave to others on average meanwhile.
    pub stolen_cores: Option<f64>,
    /// Highest clock of a core at the start, in MHz, as the system says.
    pub mhz_before: Option<f64>,
    /// And at the end.
    pub mhz_after: Option<f64>,
    /// Highest temperature at the start, in degrees Celsius.
    pub celsius_before: Option<f64>,
    /// And at the end.
    pub celsius_after: Option<f64>,
    /// What of this puts the figures in doubt.
    pub notes: Vec<String>,
}

/// Watches from [`start`](Watch::start) to [`end`](Watch::end).
#[derive(Debug)]
pub struct Watch {
    start: Instant,
    before: Snapshot,
}

#[derive(Debug, Clone, Copy, Default)]
struct Snapshot {
    load: Option<[f64; 3]>,
    mhz: Option<f64>,
    celsius: Option<f64>,
    ticks: Option<Ticks>,
}

/// CPU time since the start of the system, in ticks, of all cores.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Ticks {
    all: u64,
    busy: u64,
    stolen: u64,
    own: u64,
}

impl Watch {
    /// Notes the state at the start.
    pub fn start() -> Self {
        Self { start: Instant::now(), before: Snapshot::take() }
    }

    /// The state at the end, and what to say about both. `threads` is how many this program meant to keep busy.
    pub fn end(self, threads: usize) -> Conditions {
        let (before, after) = (self.before, Snapshot::take());
        let shares = before.ticks.zip(after.ticks).and_then(|(a, b)| shares(a, b));
        let cores = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
        let mut conditions = Conditions {
            seconds: self.start.elapsed().as_secs_f64(),
            load_before: before.load,
            load_after: after.load,
            foreign_cores: shares.map(|(foreign, _)| foreign * cores),
            stolen_cores: shares.map(|(_, stolen)| stolen * cores),
            mhz_before: before.mhz,
            mhz_after: after.mhz,
            celsius_before: before.celsius,
            celsius_after: after.celsius,
            notes: Vec::new(),
        };
        conditions.notes = notes(&conditions, cores, threads as f64);
        conditions
    }
}

impl Snapshot {
    fn take() -> Self {
        match Platform::HERE {
            Platform::Linux => Self {
                load: read("/proc/loadavg").and_then(|text| three(&text)),
                mhz: clock(),
                celsius: temperature(Path::new("/sys/class/thermal")),
                ticks: read("/proc/stat")
                    .zip(read("/proc/self/stat"))
                    .and_then(|(all, own)| ticks(&all, &own)),
            },
            Platform::MacOs => {
                let text = sysctl(&["vm.loadavg"]);
                let load = value(&text, "vm.loadavg").map(|v| v.trim_matches(['{', '}', ' ']));
                Self { load: load.and_then(three), ..Self::default() }
            }
        }
    }
}

/// The first three numbers of a text.
fn three(text: &str) -> Option<[f64; 3]> {
    let mut numbers = text.split_whitespace().map_while(|word| word.replace(',', ".").parse().ok());
    Some([numbers.next()?, numbers.next()?, numbers.next()?])
}

/// The highest current clock: of the scaling driver, else what `/proc/cpuinfo` says.
fn clock() -> Option<f64> {
    let scaled = fs::read_dir("/sys/devices/system/cpu").ok()?.flatten().filter_map(|cpu| {
        let khz: f64 = read(cpu.path().join("cpufreq/scaling_cur_freq"))?.trim().parse().ok()?;
        Some(khz / 1e3)
    });
    let highest = |values: &mut dyn Iterator<Item = f64>| {
        values.fold(None, |a: Option<f64>, b| Some(a.map_or(b, |a| a.max(b))))
    };
    highest(&mut scaled.into_iter()).or_else(|| {
        let text = read("/proc/cpuinfo")?;
        let lines = text.lines().filter(|l| l.starts_with("cpu MHz")).filter_map(|l| l.split_once(':'));
        highest(&mut lines.filter_map(|(_, v)| v.trim().parse().ok()))
    })
}

/// The highest temperature of all zones.
fn temperature(zones: &Path) -> Option<f64> {
    let of = |zone: fs::DirEntry| Some(read(zone.path().join("temp"))?.trim().parse::<f64>().ok()? / 1e3);
    // Zones that are off read as 0 or far below.
    let values = fs::read_dir(zones).ok()?.flatten().filter_map(of).filter(|t| *t > 0.0 && *t < 200.0);
    values.reduce(f64::max)
}

/// From the first line of `/proc/stat` (user nice system idle iowait irq softirq steal) and utime and stime of
/// `/proc/self/stat`, which count in the same ticks.
fn ticks(stat: &str, own: &str) -> Option<Ticks> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let counts: Vec<u64> = line.split_whitespace().map_while(|v| v.parse().ok()).take(8).collect();
    let &[user, nice, system, idle, iowait, irq, softirq, stolen] = &counts[..] else { return None };
    // The program's name is in brackets and may hold blanks and brackets.
    let mut fields = own[own.rfind(')')? + 1..].split_whitespace().skip(11);
    let (utime, stime): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let busy = user + nice + system + irq + softirq;
    Some(Ticks { all: busy + idle + iowait + stolen, busy, stolen, own: utime + stime })
}

/// Shares of all cores' time that other programs, and the hypervisor's other guests, took. `None` if no time passed.
fn shares(before: Ticks, after: Ticks) -> Option<(f64, f64)> {
    let of = |f: fn(Ticks) -> u64| f(after).saturating_sub(f(before)) as f64;
    let all = of(|t| t.all);
    (all > 0.0).then(|| {
        let foreign = (of(|t| t.busy) - of(|t| t.own)).max(0.0);
        (foreign / all, of(|t| t.stolen) / all)
    })
}

fn notes(conditions: &Conditions, cores: f64, threads: f64) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(foreign) = conditions.foreign_cores.filter(|&f| f > 0.15) {
        notes.push(format!("other programs used {foreign:.2} of {cores} cores meanwhile: figures are low"));
    }
    if let Some(stolen) = conditions.stolen_cores.filter(|&s| s > 0.05) {
        notes.push(format!("the hypervisor took {stolen:.2} of {cores} cores meanwhile: figures are low"));
    }
    if let Some([load, ..]) = conditions.load_before.filter(|load| load[0] + threads > cores + 0.5) {
        notes.push(format!("load average {load:.2} at the start, on {cores} cores: other work was running"));
    }
    if let (Some(before), Some(after)) = (conditions.mhz_before, conditions.mhz_after)
        && after < 0.9 * before
    {
        notes.push(format!("the clock fell from {before:.0} to {after:.0} MHz: try --cooldown"));
    }
    if let Some(celsius) = conditions.celsius_after.filter(|&t| t >= 90.0) {
        notes.push(format!(
            "{celsius:.0} degrees at the end: the clock may have been held back; try --cooldown"
        ));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_described() {
        let machine = Machine::look();
        assert!(machine.cores >= 1 && !machine.os.is_empty() && !machine.arch.is_empty(), "{machine:?}");
        if Platform::HERE == Platform::Linux {
            assert!(machine.memory_bytes > Some(1 << 28), "{machine:?}");
        }
    }

    #[test]
    fn a_mac_is_read_from_sysctl() {
        let text = "machdep.cpu.brand_string: Apple M2\nkern.osproductversion: 14.5\nhw.memsize: 17179869184\n\
                    hw.perflevel0.l2cachesize: 16777216\nhw.l2cachesize: 4194304\n";
        let machine = mac(text);
        assert_eq!(machine.cpu.as_deref(), Some("Apple M2"));
        assert_eq!(machine.memory_bytes, Some(17_179_869_184));
        assert_eq!(machine.last_level_cache_bytes, Some(16_777_216));
        assert_eq!(machine.os, "macOS 14.5");
        assert_eq!(mac("hw.memsize: much\n").memory_bytes, None);
    }

    #[test]
    fn linux_texts() {
        let cpuinfo = "processor\t: 0\nmodel name\t: AMD EPYC\ncpu MHz\t\t: 2445.426\n";
        assert_eq!(cpu_name(cpuinfo).as_deref(), Some("AMD EPYC"));
        assert_eq!(cpu_name("processor : 0\n"), None);
        assert_eq!(memory_bytes("MemTotal:       24649028 kB\nMemFree: 1 kB\n"), Some(24_649_028 * 1024));
        assert_eq!(three("0.55 1.20 1.40 2/311 77\n"), Some([0.55, 1.2, 1.4]));
        assert_eq!(three("1,5 2,25 3"), Some([1.5, 2.25, 3.0]), "decimal commas of some locales");
        assert_eq!(three("0.5 x"), None);
        for (text, bytes) in
            [("32768K", Some(32 << 20)), ("2M", Some(2 << 20)), ("7", Some(7)), ("K", None), ("0K", None)]
        {
            assert_eq!(size_bytes(text), bytes, "{text}");
        }
    }

    #[test]
    fn caches_count_each_instance_once() {
        let folder = tempfile::tempdir().unwrap();
        // Four cores, a second level each, two third levels shared by two.
        for cpu in 0..4 {
            let shared = if cpu < 2 { "0-1" } else { "2-3" };
            for (index, level, size, list) in
                [(2, "2", "512K", cpu.to_string()), (3, "3", "16384K", shared.to_owned())]
            {
                let dir = folder.path().join(format!("cpu{cpu}/cache/index{index}"));
                fs::create_dir_all(&dir).unwrap();
                for (name, text) in
                    [("level", level), ("size", size), ("shared_cpu_list", &list), ("type", "Unified")]
                {
                    fs::write(dir.join(name), format!("{text}\n")).unwrap();
                }
            }
        }
        assert_eq!(caches(folder.path()), Some(32 << 20));
        assert_eq!(caches(&folder.path().join("cpu0")), None);
    }

    #[test]
    fn foreign_work_is_what_others_used() {
        let own = |n: u64| format!("12 (a )b) R 1 2 3 4 5 6 7 8 9 10 {n} 5 0 0");
        let before = ticks("cpu  100 0 10 890 0 0 0 0 0 0\ncpu0 1\n", &own(50)).unwrap();
        let after = ticks("cpu  250 0 10 930 0 0 0 10 0 0\n", &own(150)).unwrap();
        assert_eq!(before, Ticks { all: 1000, busy: 110, stolen: 0, own: 55 });
        // 200 ticks passed: 150 busy, 100 of them ours, 10 stolen.
        assert_eq!(shares(before, after), Some((0.25, 0.05)));
        assert_eq!(shares(before, before), None);
        assert_eq!(ticks("cpu 1 2\n", &own(1)), None);
        assert_eq!(ticks("intr 1\n", "nonsense"), None);
    }

    #[test]
    fn notes_say_what_disturbs() {
        let quiet = Conditions {
            load_before: Some([0.2, 0.1, 0.1]),
            foreign_cores: Some(0.02),
            ..Conditions::default()
        };
        assert!(notes(&quiet, 2.0, 2.0).is_empty());
        let busy = Conditions {
            load_before: Some([1.9, 1.0, 1.0]),
            foreign_cores: Some(0.9),
            stolen_cores: Some(0.3),
            mhz_before: Some(3000.0),
            mhz_after: Some(2000.0),
            celsius_after: Some(97.0),
            ..Conditions::default()
        };
        let said = notes(&busy, 2.0, 2.0);
        assert_eq!(said.len(), 5, "{said:?}");
    }

    #[test]
    fn a_watch_sees_time_pass() {
        let conditions = Watch::start().end(1);
        assert!(conditions.seconds >= 0.0 && conditions.seconds < 60.0);
    }
}
